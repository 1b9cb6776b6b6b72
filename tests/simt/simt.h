// CUDA's words on a CPU, enough to run this project's kernels: blocks one after another, their threads as
// fibres that change over at barriers and shuffles only. A barrier that is missing shows: what it waits for
// has not happened. Memory ordering does not: there is one real thread.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
inline float __half2float(__half x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
// As wrong as PTX allows it to be, one way or the other.
inline float ex2_approx_ftz(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(x));
    const float e = std::exp2(x) * (x == 0 ? 1 : bits % 2 ? 1 + 0x1p-22f : 1 - 0x1p-22f);
    return e < 0x1p-126f ? 0 : e;
}
template <typename T>
void __stcs(T* to, T value) {
    *to = value;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace ial::gpu {
// The dynamic shared memory of the block that runs.
extern unsigned char ial_shared[];
}  // namespace ial::gpu

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10, kSharedBytes = 48 << 10;

struct Barrier {
    int arrived = 0, generation = 0;
};

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done = false;
};

struct Block {
    std::function<void()> kernel;
    std::vector<Fibre> fibres;
    ucontext_t scheduler;
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<uint64_t> lanes;  // what each thread offers to a shuffle
    unsigned current = 0;
    bool progress = false;
};
inline Block block;

inline int skipped_line = 0;  // a barrier that is left out, to see whether a test fails
inline unsigned turn = 0;     // blocks start their threads in ascending and in descending order in turn

// The last to arrive yields too, so that the threads go on in the block's order.
inline void wait(Barrier& barrier, int threads) {
    const int generation = barrier.generation;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
        block.progress = true;
    }
    do swapcontext(&block.fibres[block.current].context, &block.scheduler);
    while (barrier.generation == generation);
}

inline void syncthreads(int line) {
    if (line != skipped_line) wait(block.all, blockDim.x);
}

inline void syncwarp(int line) {
    if (line != skipped_line) wait(block.warps[block.current / kWarp], kWarp);
}

template <typename T>
T shuffle_xor(T value, int mask) {
    Barrier& warp = block.warps[block.current / kWarp];
    std::memcpy(&block.lanes[block.current], &value, sizeof(T));
    wait(warp, kWarp);
    std::memcpy(&value, &block.lanes[block.current ^ mask], sizeof(T));
    wait(warp, kWarp);
    return value;
}

inline void run_fibre() {
    block.kernel();
    block.fibres[block.current].done = true;
    block.progress = true;
}

inline void run_block(size_t shared) {
    const unsigned threads = blockDim.x;
    ASAN_UNPOISON_MEMORY_REGION(ial::gpu::ial_shared, kSharedBytes);
    std::memset(ial::gpu::ial_shared, 0xff, kSharedBytes);  // NaN, until something is written
    ASAN_POISON_MEMORY_REGION(ial::gpu::ial_shared + shared, kSharedBytes - shared);
    block.all = {};
    block.warps.assign(threads / kWarp, {});
    block.lanes.assign(threads, 0);
    if (block.fibres.size() < threads) block.fibres.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
        Fibre& fibre = block.fibres[t];
        fibre.done = false;
        ASAN_UNPOISON_MEMORY_REGION(fibre.stack.get(), kStack);
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = kStack;
        fibre.context.uc_link = &block.scheduler;
        makecontext(&fibre.context, run_fibre, 0);
    }
    const bool descending = turn++ % 2;
    for (bool alive = true; alive;) {
        alive = block.progress = false;
        for (unsigned i = 0; i < threads; ++i) {
            const unsigned t = descending ? threads - 1 - i : i;
            if (block.fibres[t].done) continue;
            alive = true;
            block.current = threadIdx.x = t;
            swapcontext(&block.scheduler, &block.fibres[t].context);
        }
        if (alive && !block.progress) throw std::logic_error("simt: a barrier that not all threads reach");
    }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            const Arguments&... arguments) {
    if (grid.x == 0 || grid.y == 0 || threads % kWarp != 0 || shared > kSharedBytes)
        throw std::logic_error("simt: a launch that CUDA refuses");
    block.kernel = [&] { kernel(arguments...); };
    gridDim = grid;
    blockDim = dim3(threads);
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(shared);
}

}  // namespace simt

#define __syncthreads() simt::syncthreads(__LINE__)
#define __syncwarp() simt::syncwarp(__LINE__)
#define __shfl_xor_sync(mask, value, lanes) simt::shuffle_xor(value, lanes)
