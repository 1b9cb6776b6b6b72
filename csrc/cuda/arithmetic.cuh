// Arithmetic of the CUDA kernels. Half precision is computed in float. A pack holds the values of a few
// neighbouring pixels, which are loaded or stored in one instruction.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// 2^x within 2 ulp and 1/x within 1 ulp. Subnormal results are 0. CUDA C++ has no intrinsics for these PTX
// instructions.
__device__ __forceinline__ float ex2_approx_ftz(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ __forceinline__ float rcp_approx_ftz(float x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
#endif

#include <type_traits>

#define IAL_D __device__ __forceinline__

namespace ial::gpu {

// -------------------------------------------------------------------------------------------------
// Numbers

template <typename T>
struct Arithmetic {
    using A = float;
};
template <>
struct Arithmetic<double> {
    using A = double;
};

IAL_D float widen(float x) { return x; }
IAL_D double widen(double x) { return x; }
IAL_D float widen(__half x) { return __half2float(x); }
IAL_D float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

IAL_D void narrow(float x, float* to) { *to = x; }
IAL_D void narrow(double x, double* to) { *to = x; }
IAL_D void narrow(float x, __half* to) { *to = __float2half_rn(x); }
IAL_D void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

// If one argument is NaN, returns the other.
IAL_D float larger(float a, float b) { return fmaxf(a, b); }
IAL_D double larger(double a, double b) { return fmax(a, b); }

// e^x = power(to_unit(x)). For float, the hardware computes 2^x, so to_unit() multiplies by log2(e).
// __fmul_rn is never contracted with an addition, so the product does not depend on where it is used.
IAL_D float to_unit(float x) { return __fmul_rn(x, 1.44269504f); }
IAL_D double to_unit(double x) { return x; }
IAL_D float from_unit(float x) { return x * 0.693147181f; }
IAL_D double from_unit(double x) { return x; }
IAL_D float power(float x) { return ex2_approx_ftz(x); }
IAL_D double power(double x) { return exp(x); }

// exp(x) for x <= 0. Rounding the product causes an error of |x| half ulp. For large |x|, e^x is small beside
// the 1 that every softmax sum contains. expf would take four times the instructions, and more time than the
// memory accesses.
template <typename A>
IAL_D A exponential(A x) {
    return power(to_unit(x));
}
// The Newton step makes the result exact for 1, which is the softmax sum of a pixel with a certain
// prediction.
IAL_D float reciprocal(float x) {
    const float r = rcp_approx_ftz(x);
    return fmaf(r, fmaf(-x, r, 1.0f), r);
}
IAL_D double reciprocal(double x) { return 1 / x; }
IAL_D float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
IAL_D double multiply_add(double a, double b, double c) { return fma(a, b, c); }
IAL_D float logarithm(float x) { return logf(x); }
IAL_D double logarithm(double x) { return log(x); }

// -------------------------------------------------------------------------------------------------
// Packs: vectors with one lane per pixel

template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
    T lane[V];
};

// CUDA's vector type for a pack of 8 or 16 bytes, which is loaded or stored in one instruction.
template <typename P>
using Word = std::conditional_t<sizeof(P) == 16, uint4, uint2>;

// Whether lanes are processed in pairs: in half precision, where the operations are exact.
template <typename T, int V>
constexpr bool kPaired = sizeof(T) == 2 && V % 2 == 0;

template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename To, typename From>
IAL_D To as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

template <typename T, int V>
IAL_D Pack<T, V> load_pack(const T* from) {
    using P = Pack<T, V>;
    if constexpr (sizeof(P) == 8 || sizeof(P) == 16)
        return as<P>(*reinterpret_cast<const Word<P>*>(from));
    else
        return *reinterpret_cast<const P*>(from);
}

template <typename T, int V>
IAL_D void store_pack(T* to, const Pack<T, V>& pack) {
    using P = Pack<T, V>;
    if constexpr (sizeof(P) == 8 || sizeof(P) == 16)
        *reinterpret_cast<Word<P>*>(to) = as<Word<P>>(pack);
    else
        *reinterpret_cast<P*>(to) = pack;
}

// A streaming store, for data that is not read again soon and need not stay in the caches. __stcs accepts
// addresses in global memory only. A tile of one pixel may be written to shared memory (Staging), so it is
// stored with a plain store.
template <typename T, int V>
IAL_D void stream_pack(T* to, const Pack<T, V>& pack) {
    using P = Pack<T, V>;
    if constexpr (V > 1 && (sizeof(P) == 8 || sizeof(P) == 16))
        __stcs(reinterpret_cast<Word<P>*>(to), as<Word<P>>(pack));
    else
        store_pack(to, pack);
}

// Makes the compiler forget that the lanes of `pack` were widened. Otherwise it keeps the widened lanes from
// one loop over the classes to the next, which takes twice the registers of half precision.
template <typename T, int V>
IAL_D void forget_widened(Pack<T, V>& pack) {
    if constexpr (kPaired<T, V>) {
        auto word = as<Word<Pack<T, V>>>(pack);
        if constexpr (sizeof(pack) == 16)
            asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
        else
            asm volatile("" : "+r"(word.x), "+r"(word.y));
        pack = as<Pack<T, V>>(word);
    }
}

// Lane j, widened. One register holds two bfloat16 values. Clearing the lower one turns the register into the
// upper one as float.
template <typename T, int V>
IAL_D auto widen(const Pack<T, V>& pack, int j) {
    if constexpr (kPaired<T, V> && std::is_same_v<T, __nv_bfloat16>) {
        unsigned pair;
        __builtin_memcpy(&pair, &pack.lane[j & ~1], sizeof(pair));
        return as<float>(j % 2 ? pair & 0xffff0000u : pair << 16);
    } else {
        return widen(pack.lane[j]);
    }
}

// max = max(max, x), lane by lane.
template <typename T, int V>
IAL_D void update_max(Pack<T, V>& max, const Pack<T, V>& x) {
    if constexpr (kPaired<T, V>) {
        for (int j = 0; j < V; j += 2) {
            Pair<T> a, b;
            __builtin_memcpy(&a, &max.lane[j], sizeof(a));
            __builtin_memcpy(&b, &x.lane[j], sizeof(b));
            a = __hmax2(a, b);
            __builtin_memcpy(&max.lane[j], &a, sizeof(a));
        }
    } else {
        for (int j = 0; j < V; ++j) narrow(larger(widen(max.lane[j]), widen(x.lane[j])), &max.lane[j]);
    }
}

// The target class of each lane, among at most 1024 classes. Replaces the lanes with a given class.
template <typename T, int V>
struct TargetClass {
    // Paired: class i is the half-precision number 1 + i / 1024, so that two are compared at a time.
    // 0 means no class.
    static constexpr unsigned kOne = 0x3c00;
    int label[V];
    unsigned pair[V / 2 + 1];

    // label[j] = labels[j] - first if that is in [0, count), otherwise -1.
    IAL_D TargetClass(const int* labels, int first, int count) {
        for (int j = 0; j < V; ++j) {
            const int i = labels[j] - first;
            label[j] = i >= 0 && i < count ? i : -1;
        }
        if constexpr (kPaired<T, V>)
            for (int j = 0; j < V; ++j) {
                const unsigned number = label[j] < 0 ? 0 : kOne + label[j];
                pair[j / 2] = j % 2 ? pair[j / 2] | number << 16 : number;
            }
    }

    // Sets pack = by in the lanes with target class i.
    IAL_D void replace(Pack<T, V>& pack, const Pack<T, V>& by, int i) const {
        if constexpr (kPaired<T, V>) {
            const auto number = as<__half2>((kOne + i) * 0x10001u);
            for (int j = 0; j < V; j += 2) {
                const unsigned mask = __heq2_mask(as<__half2>(pair[j / 2]), number);
                unsigned a, b;
                __builtin_memcpy(&a, &pack.lane[j], sizeof(a));
                __builtin_memcpy(&b, &by.lane[j], sizeof(b));
                a = (a & ~mask) | (b & mask);
                __builtin_memcpy(&pack.lane[j], &a, sizeof(a));
            }
        } else {
            for (int j = 0; j < V; ++j)
                if (label[j] == i) pack.lane[j] = by.lane[j];
        }
    }
};

}  // namespace ial::gpu
