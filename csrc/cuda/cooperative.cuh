// The whole loss and its gradient in one cooperative launch: reduce, combine and their backward kernels.
// The logits stay on the chip in between.
#pragma once

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#endif

#include "backward.cuh"
#include "combine.cuh"

namespace ial::gpu {

#if defined(__CUDACC__)
// Waits for all blocks of a cooperative launch. What they wrote before is visible afterwards.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }
#endif

// Threads of a block. Each multiprocessor runs one block. 384 threads if the registers suffice for their
// tiles, otherwise 256.
template <typename Tile>
constexpr int kCooperativeThreads = Tile::B * sizeof(Pack<typename Tile::T, Tile::V>) <= 192 ? 384 : 256;

template <typename T>
struct Cooperative {
    using A = typename Arithmetic<T>::A;

    Combine combine;             // of the whole batch
    double *stats, *grad_stats;  // [N, levels, kStats]; grad_stats for an incoming gradient of 1
    Combined<A> results;
    double* partial;       // [2, images of a wave, levels, kStats, blocks]
    const double* weight;  // [weights]: parts of the batch's weight; null if one wave is the whole batch
    int weights;
    int64_t wave;   // images that are processed at a time
    int64_t saved;  // tiles per thread that shared memory keeps from reduce to its backward
    bool exact;
    ComputedFor computed_for;
    T* grad;
};

// Offsets into a block's shared memory, in bytes. stats and grad_stats reuse the memory of the thread sums.
template <typename Tile>
struct CooperativeShared {
    size_t slots;              // [saved, classes, threads] packs
    size_t backward_classes;   // [classes]
    size_t thread_sums;        // [levels, kStats, threads]; reused for:
    size_t stats, grad_stats;  // [wave, levels, kStats]
    size_t reduce_classes;     // [classes]
    size_t end;

    IAL_HD CooperativeShared(int64_t classes, int levels, int64_t wave, int64_t saved) {
        using A = typename Tile::A;
        constexpr int Threads = kCooperativeThreads<Tile>;
        const size_t row = kStats * sizeof(double), rows = wave * levels * row;
        const size_t sums = size_t(levels) * kStats * Threads * sizeof(A);
        slots = 0;
        backward_classes = saved * classes * Threads * sizeof(Pack<typename Tile::T, Tile::V>);
        thread_sums = stats = backward_classes + classes * sizeof(BackwardClass<A>);
        grad_stats = stats + rows;
        reduce_classes = thread_sums + (sums > 2 * rows ? sums : 2 * rows);
        end = reduce_classes + classes * sizeof(ReduceClass<A>);
    }
};

// The batch is processed in waves. A wave has as many images as stay on the chip from reduce to its backward,
// with `blocks` blocks each. A thread keeps its first tiles in shared memory and its last tile in registers.
// It reads the other tiles again, in reverse order, because L2 holds what was read last.
template <typename Tile>
__global__ void __launch_bounds__(kCooperativeThreads<Tile>, 1)
    cooperative_kernel(const __grid_constant__ Problem<typename Tile::T> problem,
                       const __grid_constant__ Cooperative<typename Tile::T> call,
                       const __grid_constant__ Lambdas lambdas) {
    using T = typename Tile::T;
    using A = typename Tile::A;
    constexpr int Threads = kCooperativeThreads<Tile>;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    const Layout& layout = problem.layout;
    const CooperativeShared<Tile> at(layout.classes, problem.levels, call.wave, call.saved);
    auto* const slots = reinterpret_cast<T*>(ial_shared + at.slots);
    auto* const backward_classes = reinterpret_cast<BackwardClass<A>*>(ial_shared + at.backward_classes);
    const ThreadSums<A, Threads> thread_sums{reinterpret_cast<A*>(ial_shared + at.thread_sums),
                                             problem.levels};
    auto* const stats = reinterpret_cast<double*>(ial_shared + at.stats);
    auto* const grad_stats = reinterpret_cast<double*>(ial_shared + at.grad_stats);
    auto* const reduce_classes = reinterpret_cast<ReduceClass<A>*>(ial_shared + at.reduce_classes);
    const int sums = problem.levels * kStats;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t own = blockIdx.x / problem.blocks;  // this block's image in the wave
    const GridStride<Tile::V, Threads> loop(layout, problem.blocks, blockIdx.x % problem.blocks);
    const auto slot = [&](int64_t i) {
        return slots + (i * layout.classes * Threads + threadIdx.x) * Tile::V;
    };
    load_classes<Threads>(problem, 0, reduce_classes);

    Tile tile(problem);
    int parity = 0;  // of the wave; some blocks may still read `partial` while others write the next wave's
    for (int64_t first = 0; first < layout.batch; first += call.wave, parity ^= 1) {
        const int64_t images = call.wave < layout.batch - first ? call.wave : layout.batch - first;
        const int64_t image = first + own, count = own < images ? loop.count : 0;
        const auto logits = [&](int64_t pixel) {
            return problem.logits + layout.offset(layout.logits, image, pixel);
        };
        double* const partial = call.partial + parity * call.wave * sums * problem.blocks;

        thread_sums.clear();
        __syncthreads();
        LevelSums<A, Threads> level_sums(thread_sums);
        bool bad_label = false;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t pixel = loop.pixel(i);
            if (pixel >= layout.pixels) break;
            tile.read(image, pixel, logits(pixel), layout.logits.channel, reduce_classes);
            bad_label |= tile.labels.bad;
            level_sums.add(tile, reduce_classes);
            if (i < call.saved) tile.store_logits(slot(i), Threads * Tile::V);
        }
        level_sums.flush();
        if (bad_label) level_sums.set_nan();
        __syncthreads();
        thread_sums.total(partial + own * sums * problem.blocks + blockIdx.x % problem.blocks,
                          problem.blocks);
        grid_barrier();

        for (int64_t i = warp; i < images * sums; i += Threads / kWarp) {
            const double sum = sum_blocks(partial + i * problem.blocks, problem.blocks);
            if (lane == 0) stats[i] = sum;
        }
        __syncthreads();
        Combine combine = call.combine;
        combine.lambdas = lambdas.value;
        combine.stats = stats;
        combine.batch = images;
        const double divisor = call.weight ? sum_blocks(call.weight, call.weights) : combine.mean_divisor();
        write_grad_stats(combine, UnitGradient(), divisor, grad_stats);
        __syncthreads();
        if (blockIdx.x == 0)
            for (int64_t i = threadIdx.x; i < images * sums; i += Threads) {
                call.stats[first * sums + i] = stats[i];
                call.grad_stats[first * sums + i] = grad_stats[i];
            }
        if (count > 0)
            load_classes<Threads>(problem, grad_stats + own * sums, call.computed_for.value(),
                                  backward_classes);
        __syncthreads();

        for (int64_t i = count - 1; i >= 0; --i) {
            const int64_t pixel = loop.pixel(i);
            if (pixel >= layout.pixels) continue;
            const bool saved = i < call.saved;
            if (i < count - 1)
                tile.read(image, pixel, saved ? slot(i) : logits(pixel),
                          saved ? Threads * Tile::V : layout.logits.channel, backward_classes);
            differentiate(tile, backward_classes, call.exact,
                          call.grad + layout.offset(layout.grad, image, pixel), layout.grad.channel);
        }
    }
    if (blockIdx.x > 0) return;
    if (threadIdx.x == 0) call.computed_for.write();
    Combine combine = call.combine;
    combine.lambdas = lambdas.value;
    combine.stats = call.stats;
    call.results.write(combine);
}

}  // namespace ial::gpu
