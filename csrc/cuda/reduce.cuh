// reduce: the five sums of each image and level, in one read of the logits.
// Each block writes partial sums. sum_kernel adds the partial sums of an image's blocks.
//
// All kernels: the grid alone determines which thread adds what. Sums are added in a fixed order, without
// atomics. Results are therefore bitwise the same in every run. Kernels take plain structs, never tensors.
// cuda/launch.h launches them.
#pragma once

#include "tile.cuh"

namespace ial::gpu {

// Minimum blocks per multiprocessor: as many as the registers of the tile allow. The loads of a block hide
// behind the arithmetic of the others. Without a minimum, the compiler aims at more and spills a few
// registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kHalfBlocks = 4;  // with five, a kernel for 19 classes spills on other architectures than sm_90
#else
constexpr int kHalfBlocks = 5;
#endif
template <typename Tile>
constexpr int kTileBlocks = Tile::B > 19                    ? 2
                            : sizeof(typename Tile::T) == 2 ? kHalfBlocks
                                                            : 3;

template <typename A>
struct ReduceClass {
    A weight;
    int level;  // relative to the first level that the block sums
};

// Fills by_class[C]. The caller must synchronise the block afterwards.
template <int Threads, typename T, typename A>
IAL_D void load_classes(const Operands<T>& problem, int first_level, ReduceClass<A>* by_class) {
    for (int c = threadIdx.x; c < problem.classes; c += Threads)
        by_class[c] = {problem.weight_of(c), problem.class_levels[c] - first_level};
}

IAL_D double warp_sum(double value) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
}

// The weighted cross-entropy of pixel j of a tile. w is the product of pixel weight and class weight.
template <typename Tile>
IAL_D typename Tile::A cross_entropy(const Tile& tile, int j, typename Tile::A w) {
    using A = typename Tile::A;
    const A log_sum = logarithm(tile.sum[j]), target_term = w * (log_sum - tile.target[j]);
    if constexpr (!Tile::kSmooth) return target_term;
    const A class_term = multiply_add(tile.weights, log_sum, -tile.smooth[j]);
    return multiply_add(tile.problem.class_share * tile.labels.pixel_weight(j), class_term,
                        tile.problem.target_share * target_term);
}

// The sum of a row of `Threads` values, computed by one warp.
template <int Threads, typename A>
IAL_D double sum_row(const A* row) {
    double total = 0;
    for (int i = threadIdx.x % kWarp; i < Threads; i += kWarp) total += row[i];
    return warp_sum(total);
}

// sums[levels, kStats, Threads] in shared memory. Each thread adds to its own column.
template <typename A, int Threads>
struct ThreadSums {
    A* const sums;
    const int levels;

    IAL_D void clear() const {
        for (int slot = 0; slot < levels * kStats; ++slot) sums[slot * Threads + threadIdx.x] = 0;
    }

    // Writes the sum of row i to to[i * step], one warp per row. The caller must synchronise the block before
    // and after.
    IAL_D void total(double* to, int64_t step) const {
        for (int slot = threadIdx.x / kWarp; slot < levels * kStats; slot += Threads / kWarp) {
            const double total = sum_row<Threads>(sums + slot * Threads);
            if (threadIdx.x % kWarp == 0) to[slot * step] = total;
        }
    }

    static constexpr size_t bytes(int levels) { return size_t(levels) * kStats * Threads * sizeof(A); }
};

// A thread's sums of one level, kept in registers until a pixel of another level follows. Neighbouring pixels
// tend to have the same level. flush() adds the sums to the thread's column.
template <typename A, int Threads>
struct LevelSums {
    A* const column;
    const int levels;
    int level = -1;
    A sums[kStats] = {};

    IAL_D explicit LevelSums(const ThreadSums<A, Threads>& block)
        : column(block.sums + threadIdx.x), levels(block.levels) {}

    template <typename Tile>
    IAL_D void add(const Tile& tile, const ReduceClass<A>* by_class) {
#pragma unroll
        for (int j = 0; j < Tile::V; ++j) {
            const ReduceClass<A> target = by_class[tile.labels.class_or_any(j)];
            const A w = target.weight * tile.labels.pixel_weight(j);
            const A s = cross_entropy(tile, j, w);
            const A pi = tile.target_exp(j) * reciprocal(tile.sum[j]);
            if (!tile.labels.has(j) || target.level < 0 || target.level >= levels) continue;
            if (target.level != level) {
                flush();
                level = target.level;
            }
            sums[kS] += s;
            sums[kP2] += pi * pi;
            sums[kQ2] += (1 - pi) * (1 - pi);
            sums[kCount] += 1;
            sums[kWeight] += w;
        }
    }

    IAL_D void flush() {
        for (int s = 0; s < kStats; ++s) {
            if (level >= 0) column[(level * kStats + s) * Threads] += sums[s];
            sums[s] = 0;
        }
    }

    // A label that is neither a class nor ignore_index sets S_0 to NaN. No gradient depends on S_0.
    IAL_D void set_nan() const { column[kS * Threads] = NAN; }
};

// The common part of the reduce kernels. Grid: (images x blocks, groups of levels). A block has shared memory
// for `block_levels` levels, and each further group reads the logits again. body(image, block, by_class, add)
// calls add(tile) for each tile of the thread. partial: [images, levels, kStats, blocks].
template <typename T, typename Body>
IAL_D void sum_levels(const Operands<T>& problem, unsigned char* shared, int block_levels, double* partial,
                      const Body& body) {
    using A = typename Arithmetic<T>::A;
    const int first_level = blockIdx.y * block_levels;
    const int levels =
        block_levels < problem.levels - first_level ? block_levels : problem.levels - first_level;
    const int64_t image = blockIdx.x / problem.blocks;
    const int block = blockIdx.x % problem.blocks;

    auto* const by_class = reinterpret_cast<ReduceClass<A>*>(shared);
    load_classes<kThreads>(problem, first_level, by_class);
    const ThreadSums<A, kThreads> thread_sums{reinterpret_cast<A*>(by_class + problem.classes), levels};
    thread_sums.clear();
    __syncthreads();

    LevelSums<A, kThreads> level_sums(thread_sums);
    bool bad_label = false;
    body(image, block, by_class, [&](const auto& tile) {
        bad_label |= tile.labels.bad;
        level_sums.add(tile, by_class);
    });
    level_sums.flush();
    if (bad_label && first_level == 0) level_sums.set_nan();
    __syncthreads();
    thread_sums.total(partial + (image * problem.levels + first_level) * kStats * problem.blocks + block,
                      problem.blocks);
}

template <typename Tile>
__global__ void __launch_bounds__(kThreads, kTileBlocks<Tile>)
    reduce_kernel(const __grid_constant__ Problem<typename Tile::T> problem, int block_levels,
                  double* partial) {
    using T = typename Tile::T;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    const size_t staged_bytes = problem.staged ? staging_bytes<T>(problem.classes) : 0;
    const Staging<T> staging(ial_shared, problem.classes);
    sum_levels(problem, ial_shared + staged_bytes, block_levels, partial,
               [&](int64_t image, int block, const auto* by_class, const auto& add) {
                   Tile tile(problem);
                   const GridStride<Tile::V, kThreads> loop(problem.layout, problem.blocks, block);
                   for (int64_t i = 0; i < loop.count; ++i)
                       read_tile(tile, staging, image, loop.pixel(i), by_class, [&] { add(tile); });
               });
}

// The sum of `blocks` partial sums, computed by one warp. The loads bypass L1, which may hold stale values.
IAL_D double sum_blocks(const double* partial, int blocks) {
    double total = 0;
    for (int b = threadIdx.x % kWarp; b < blocks; b += kWarp) total += __ldcg(partial + b);
    return warp_sum(total);
}

// stats[i] = sum over b of partial[i, b]. One block of one warp for each i.
static __global__ void __launch_bounds__(kWarp) sum_kernel(const double* partial, int blocks, double* stats) {
    const double total = sum_blocks(partial + int64_t(blockIdx.x) * blocks, blocks);
    if (threadIdx.x == 0) stats[blockIdx.x] = total;
}

}  // namespace ial::gpu
