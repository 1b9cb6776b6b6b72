// What a CUDA thread works on. It owns a tile: V pixels that lie side by side, 16 bytes of a row or, of many
// classes, 8, and all their classes in registers, B at a time. Where rows cannot be cut into aligned vectors,
// V is 1 and a pixel lies wherever its strides say. Block b of the `blocks` of an image takes its tiles b, b
// + blocks, ... in units of its threads.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// 2^x within 2 ulp and 1/x within 1, 0 where that is subnormal: PTX that CUDA C++ has no word for.
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

#include "../layout.h"
#include "../loss.h"

namespace ial {
namespace gpu {

// Threads of a warp and of a block of most kernels, and what fits into a kernel's parameters beside the rest.
constexpr int kWarp = 32, kThreads = 128, kMaxClasses = 1024, kMaxLevels = 256;

#define IAL_D __device__ __forceinline__

// -------------------------------------------------------------------------------------------------
// Numbers: half precision is computed in float

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

// Of a number and a NaN, the number.
IAL_D float larger(float a, float b) { return fmaxf(a, b); }
IAL_D double larger(double a, double b) { return fmax(a, b); }

// Logits in the unit in which a power is the machine's, for as many powers of one as there are: octaves for
// float. e^x = power(to_unit(x)). __fmul_rn is never merged with an addition, so that the result does not
// depend on what is done with it.
IAL_D float to_unit(float x) { return __fmul_rn(x, 1.44269504f); }
IAL_D double to_unit(double x) { return x; }
IAL_D float from_unit(float x) { return x * 0.693147181f; }
IAL_D double from_unit(double x) { return x; }
IAL_D float power(float x) { return ex2_approx_ftz(x); }
IAL_D double power(double x) { return exp(x); }

// For x <= 0. The rounding of the product is an error of |x| half ulp, but then e^x is small beside the 1
// that the softmax of a pixel always has. expf would cost four times the instructions, and more than the
// memory.
template <typename A>
IAL_D A exponential(A x) {
    return power(to_unit(x));
}
// The step of Newton's makes it exact for 1, the softmax's sum where a network is sure.
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
// Packs: the lanes of a vector, one for each pixel

template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
    T lane[V];
};

// The machine's word for a pack of 8 or 16 bytes, which it reads and writes in one go.
template <typename P>
using Word = std::conditional_t<sizeof(P) == 16, uint4, uint2>;

// Lanes of half precision are computed in pairs where that is exact.
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

// Past what the caches keep: nobody reads it again soon. __stcs reaches global memory only, and a tile of one
// pixel may go to a slab in shared memory: its store is a plain one.
template <typename T, int V>
IAL_D void stream_pack(T* to, const Pack<T, V>& pack) {
    using P = Pack<T, V>;
    if constexpr (V > 1 && (sizeof(P) == 8 || sizeof(P) == 16))
        __stcs(reinterpret_cast<Word<P>*>(to), as<Word<P>>(pack));
    else
        store_pack(to, pack);
}

// Lets the compiler forget that it has widened the lanes of `pack`: it would keep them, in twice the
// registers that the half-precision lanes take, from one pass over the classes to the next.
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

// Lane j, widened. Of two bfloat16 in a register, the upper one is a float when the lower one is cleared.
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

// The larger of each lane.
template <typename T, int V>
IAL_D void raise(Pack<T, V>& to, const Pack<T, V>& by) {
    if constexpr (kPaired<T, V>) {
        for (int j = 0; j < V; j += 2) {
            Pair<T> a, b;
            __builtin_memcpy(&a, &to.lane[j], sizeof(a));
            __builtin_memcpy(&b, &by.lane[j], sizeof(b));
            a = __hmax2(a, b);
            __builtin_memcpy(&to.lane[j], &a, sizeof(a));
        }
    } else {
        for (int j = 0; j < V; ++j) narrow(larger(widen(to.lane[j]), widen(by.lane[j])), &to.lane[j]);
    }
}

// Which of up to 1024 classes is each lane's own: replaces that lane of a pack.
template <typename T, int V>
struct OwnClass {
    // Paired: class i as the half-precision number 1 + i / 1024, for a comparison of two at a time; 0 for
    // none.
    static constexpr unsigned kOne = 0x3c00;
    int label[V];
    unsigned pair[V / 2 + 1];

    // label[j] - first, if that is in [0, count).
    IAL_D OwnClass(const int* labels, int first, int count) {
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

IAL_D double warp_sum(double value) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
}

// -------------------------------------------------------------------------------------------------
// Tiles

// What a kernel is given, wherever the pixels lie.
template <typename T>
struct Operands {
    using A = typename Arithmetic<T>::A;

    const T* logits;
    const void* target;
    const A* weight;        // [C], or null for ones
    const A* pixel_weight;  // or null for ones
    int64_t ignore_index;
    Label label;
    int classes, levels;
    int blocks;  // of an image
    uint8_t class_levels[kMaxClasses];

    IAL_D A weight_of(int64_t c) const { return weight ? weight[c] : A(1); }

    // Does `body(target)` with a pointer to its type.
    template <typename Body>
    IAL_D void with_target(const Body& body) const {
        switch (label) {
            case Label::kUInt8:
                body(static_cast<const uint8_t*>(target));
                break;
            case Label::kInt32:
                body(static_cast<const int32_t*>(target));
                break;
            default:
                body(static_cast<const int64_t*>(target));
        }
    }
};

template <typename T>
struct Problem : Operands<T> {
    Layout layout;
    bool dense_labels;  // a tile's labels are one aligned vector
    bool staged;        // channels lie side by side, and pixels too: see Slab
};

// The class that y is, -1 where it is none. Sets `bad` where it is not ignore_index either.
IAL_D int class_of(int64_t y, int64_t classes, int64_t ignore, bool* bad) {
    const bool is_class = static_cast<uint64_t>(y) < static_cast<uint64_t>(classes) && y != ignore;
    *bad |= !is_class && y != ignore;
    return is_class ? static_cast<int>(y) : -1;
}

// label[j]: the class of pixel j, -1 where it has none. Returns whether a label is neither a class nor
// ignore_index.
template <int V, typename L>
IAL_D bool classify(const L* from, int64_t stride, bool dense, int64_t classes, int64_t ignore, int* label) {
    Pack<L, V> pack;
    if (dense) {
        pack = load_pack<L, V>(from);
    } else {
        for (int j = 0; j < V; ++j) pack.lane[j] = from[j * stride];
    }
    bool bad = false;
    for (int j = 0; j < V; ++j) label[j] = class_of(pack.lane[j], classes, ignore, &bad);
    return bad;
}

// The labels and weights of V pixels.
template <typename T, int V>
struct Labels {
    using A = typename Arithmetic<T>::A;

    int label[V];  // -1: none
    bool bad;      // one is neither a class nor ignore_index
    const A* weight;
    int64_t weight_stride;

    IAL_D void read(const Problem<T>& problem, int64_t image, int64_t pixel) {
        const Layout& layout = problem.layout;
        const int64_t first = layout.offset(layout.target, image, pixel), stride = layout.target.pixel;
        const auto load = [&](auto* labels) {
            bad = classify<V>(labels + first, stride, problem.dense_labels, layout.classes,
                              problem.ignore_index, label);
        };
        problem.with_target(load);
        weight_stride = layout.pixel_weight.pixel;
        weight = problem.pixel_weight
                     ? problem.pixel_weight + layout.offset(layout.pixel_weight, image, pixel)
                     : nullptr;
    }

    IAL_D bool has(int j) const { return label[j] >= 0; }

    // The class of pixel j, or any where it has none.
    IAL_D int some_class(int j) const { return label[j] < 0 ? 0 : label[j]; }

    IAL_D A pixel_weight(int j) const { return weight ? weight[j * weight_stride] : A(1); }
};

// Classes that take turns in the registers of a tile, where there are more.
constexpr int kMostClasses = 32;

// V pixels x up to B classes in registers. The number of classes is never a constant to the compiler: given
// one, it widens all of them at once and runs out of registers.
template <typename T_, int V_, int B_>
struct Tile {
    using T = T_;
    using A = typename Arithmetic<T>::A;
    static constexpr int V = V_, B = B_;
    static constexpr bool kTakesTurns = B == kMostClasses;

    const Problem<T>& problem;
    const int classes;
    Labels<T, V> labels;
    const T* from;    // its logit of class 0
    int64_t channel;  // from there to the next class
    Pack<T, V> x[B];
    A max[V], sum[V];  // max_c x_c, sum_c exp(x_c - max)
    A target[V];       // x_y - max

    IAL_D explicit Tile(const Problem<T>& problem) : problem(problem), classes(problem.classes) {}

    // The pixels from `pixel` of an image, whose logits lie at `from`. These come first of all loads: the
    // others arrive while they are awaited.
    IAL_D void read(int64_t image, int64_t pixel, const T* from_, int64_t channel_) {
        from = from_;
        channel = channel_;
        load_logits(0);
        labels.read(problem, image, pixel);
        T own[V];
        for (int j = 0; j < V; ++j) own[j] = from[j + labels.some_class(j) * channel];
        softmax();
        for (int j = 0; j < V; ++j) target[j] = widen(own[j]) - max[j];
    }

    // e^(x_y - max)
    IAL_D A own(int j) const { return exponential(target[j]); }

    // Whether x holds all classes, and not only those whose turn was last.
    IAL_D bool whole() const { return !kTakesTurns || classes <= B; }

    // Does `body(first)` for the first class of each turn.
    template <typename Body>
    IAL_D void for_turns(const Body& body) {
        if constexpr (kTakesTurns) {
#pragma unroll 1
            for (int first = 0; first < classes; first += B) body(first);
        } else {
            body(0);
        }
    }

    // Does `body(i)` for each class first + i that x[i] can hold.
    template <typename Body>
    IAL_D void for_classes(int first, const Body& body) const {
#pragma unroll
        for (int i = 0; i < B; ++i)
            if (first + i < classes) body(i);
    }

    IAL_D void load_logits(int first) {
        const T* at = from + first * channel;
        for_classes(first, [&](int i) {
            x[i] = load_pack<T, V>(at);
            at += channel;
        });
    }

    // While all logits are -inf, exp(x_c - 0) = 0 stands for their terms: -inf - -inf would be NaN though a
    // finite logit may follow.
    IAL_D void softmax() {
        Pack<T, V> peak;
        for (int j = 0; j < V; ++j) {
            narrow(-HUGE_VALF, &peak.lane[j]);
            sum[j] = 0;
        }
        for_turns([&](int first) {
            if (first > 0) load_logits(first);
            A seen[V], shift[V];
            for (int j = 0; j < V; ++j) seen[j] = widen(peak, j);
            for_classes(first, [&](int i) { raise(peak, x[i]); });
            for (int j = 0; j < V; ++j) {
                max[j] = widen(peak, j);
                shift[j] = max[j] == -HUGE_VALF ? A(0) : max[j];
                if (first > 0) sum[j] *= exponential(seen[j] - shift[j]);
            }
            for_classes(first, [&](int i) {
                for (int j = 0; j < V; ++j) sum[j] += exponential(widen(x[i], j) - shift[j]);
            });
        });
    }

    // Writes its logits where a thread keeps them, one pack after another, `step` elements apart; not for
    // more than B classes.
    IAL_D void keep(T* to, int64_t step) const {
        for_classes(0, [&](int i) {
            store_pack(to, x[i]);
            to += step;
        });
    }

    // dL/dX_c = scale e^(x_c - max) and, for the pixel's own class, `own`. scale is 0 for pixels without a
    // class; where their logits are not finite 0 takes the logits' place, since 0 times e^x would be NaN.
    IAL_D void store_gradient(T* to, int64_t step, const A* scale, const A* own) {
        Pack<T, V> at_own;
        bool wild = false;
        for (int j = 0; j < V; ++j) {
            narrow(own[j], &at_own.lane[j]);
            wild |= labels.label[j] < 0 && !(sum[j] > 0 && sum[j] < HUGE_VALF);
        }
        for_turns([&](int first) {
            if (!whole()) load_logits(first);
            if (wild) silence(first);
            const OwnClass<T, V> own_class(labels.label, first, B);
            for_classes(first, [&](int i) {
                Pack<T, V> g;
                forget_widened(x[i]);
                for (int j = 0; j < V; ++j)
                    narrow(exponential(widen(x[i], j) - max[j]) * scale[j], &g.lane[j]);
                own_class.replace(g, at_own, i);
                stream_pack(to, g);
                to += step;
            });
        });
    }

    // Logits 0 for pixels without a class.
    IAL_D void silence(int first) {
        for (int j = 0; j < V; ++j) {
            if (labels.label[j] >= 0) continue;
            max[j] = 0;
            for_classes(first, [&](int i) { narrow(A(0), &x[i].lane[j]); });
        }
    }
};

// Channels-last logits: the 32 pixels of a warp lie in one piece, which its lanes carry to and from shared
// memory, element by element in order. Straight from global memory each lane would read and write a line of
// its own. slab: [kWarp, classes], one of those of the block's warps
template <typename T>
struct Slab {
    T* const slab;
    const int classes, lane;

    IAL_D Slab(unsigned char* shared, int64_t classes)
        : slab(reinterpret_cast<T*>(shared) + threadIdx.x / kWarp * kWarp * classes),
          classes(static_cast<int>(classes)),
          lane(threadIdx.x % kWarp) {}

    IAL_D T* own() const { return slab + lane * classes; }

    // Elements of the warp's pixels that are in the image; `pixel` is the lane's own.
    IAL_D int64_t first(int64_t pixel) const { return (pixel - lane) * classes; }
    IAL_D int count(int64_t pixel, int64_t pixels) const {
        const int64_t rest = pixels - (pixel - lane);
        return classes * static_cast<int>(rest < 0 ? 0 : rest < kWarp ? rest : kWarp);
    }

    // `image`: the first element of an image. Whatever the lanes did in the slab before is done.
    IAL_D void load(const T* image, int64_t pixel, int64_t pixels) const {
        __syncwarp();
        const int elements = count(pixel, pixels);
        for (int i = lane; i < elements; i += kWarp) slab[i] = image[first(pixel) + i];
        __syncwarp();
    }
    IAL_D void store(T* image, int64_t pixel, int64_t pixels) const {
        __syncwarp();
        const int elements = count(pixel, pixels);
        for (int i = lane; i < elements; i += kWarp) image[first(pixel) + i] = slab[i];
    }
};

template <typename T>
constexpr size_t slab_bytes(int64_t classes) {
    return kThreads * classes * sizeof(T);
}

// The rounds of a block of an image, and the first pixel of its thread's tile in each: beyond the image in
// some threads of the last round.
template <int V, int Threads>
struct Rounds {
    int64_t count, first, step;

    IAL_D Rounds(const Layout& layout, int blocks, int block) {
        first = (int64_t(block) * Threads + threadIdx.x) * V;
        step = int64_t(blocks) * Threads * V;
        count = (layout.pixels - int64_t(block) * Threads * V + step - 1) / step;
    }
    IAL_D int64_t pixel(int64_t round) const { return first + round * step; }
};

}  // namespace gpu
}  // namespace ial
