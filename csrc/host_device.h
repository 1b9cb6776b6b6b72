// Macros for code that is compiled for both host and device.
#pragma once

#if defined(__CUDACC__)
#define IAL_HD __host__ __device__ __forceinline__
#define IAL_ROLLED _Pragma("unroll 1")  // unrolling would only grow the code
#else
#define IAL_HD inline __attribute__((always_inline))
#define IAL_ROLLED
#endif
