// Compiles the kernels once for each instruction set, and selects one at run time.
#pragma once

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "problem.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define IAL_X86 1
#endif

#define IAL_INLINE IAL_TARGET inline __attribute__((always_inline))
#define IAL_SIMD _Pragma("omp simd")
#define IAL_UNROLL _Pragma("GCC unroll 8")

// upsample.h includes pixels.h, which includes simd.h. IAL_ISA is their namespace. IAL_TARGET enables the
// instruction set for each function. IAL_X86_VECTORS is the width of its vectors in bits.
#define IAL_ISA baseline
#define IAL_TARGET
#define IAL_X86_VECTORS 0
#include "upsample.h"
#undef IAL_ISA
#undef IAL_TARGET
#undef IAL_X86_VECTORS

#ifdef IAL_X86
#define IAL_X86_VECTORS 256
#define IAL_ISA avx2
#define IAL_TARGET __attribute__((target("avx2,fma,f16c")))
#include "upsample.h"
#undef IAL_ISA
#undef IAL_TARGET

#undef IAL_X86_VECTORS
#define IAL_X86_VECTORS 512
#define IAL_ISA avx512
#ifdef __clang__
#define IAL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#else
#define IAL_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")))
#endif
#include "upsample.h"
#undef IAL_ISA
#undef IAL_TARGET
#undef IAL_X86_VECTORS
#endif  // IAL_X86

namespace ial {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The widest instruction set that this machine supports and ATEN_CPU_CAPABILITY allows.
inline Isa isa() {
#ifdef IAL_X86
    static const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return Isa::kAvx512;
    if (capability == "AVX2") return Isa::kAvx2;
#endif
    return Isa::kBaseline;
}

#ifdef IAL_X86
#define IAL_DISPATCH(function, ...)                        \
    (isa() == Isa::kAvx512 ? avx512::function(__VA_ARGS__) \
     : isa() == Isa::kAvx2 ? avx2::function(__VA_ARGS__)   \
                           : baseline::function(__VA_ARGS__))
#else
#define IAL_DISPATCH(function, ...) baseline::function(__VA_ARGS__)
#endif

}  // namespace ial
