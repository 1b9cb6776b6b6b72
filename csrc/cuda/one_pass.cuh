// The loss of one level and its gradient, in one read of the logits and one write. The gradient needs no sum
// over the logits but only the divisor of the mean, which comes from labels and weights.
#pragma once

#include "backward.cuh"

namespace ial::gpu {

// Threads of a block of weight_kernel: one block on each multiprocessor keeps its memory busy, and there are
// few parts to add.
constexpr int kWeightThreads = 1024;

// The weight of the valid pixels in parts[gridDim.x], a part from each block. Of the problem it takes labels
// and weights, and its layout has theirs.
template <typename T, int V>
__global__ void __launch_bounds__(kWeightThreads)
    weight_kernel(const __grid_constant__ Problem<T> problem, double* parts) {
    extern __shared__ __align__(16) unsigned char ial_shared[];
    auto* const of_warp = reinterpret_cast<double*>(ial_shared);
    const Layout& layout = problem.layout;
    const int64_t tiles = layout.pixels / V, step = int64_t(gridDim.x) * kWeightThreads;
    double total = 0;
    const int64_t first = int64_t(blockIdx.x) * kWeightThreads + threadIdx.x;
    for (int64_t i = first; i < layout.batch * tiles; i += step) {
        Labels<T, V> labels;
        labels.read(problem, i / tiles, i % tiles * V);
        for (int j = 0; j < V; ++j)
            if (labels.has(j)) total += problem.weight_of(labels.label[j]) * labels.pixel_weight(j);
    }
    total = warp_sum(total);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = total;
    __syncthreads();
    if (threadIdx.x >= kWarp) return;
    total = warp_sum(of_warp[threadIdx.x]);
    if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

template <typename T>
struct OnePass {
    const double* divisor;  // [parts], which add up to what the loss is divided by, or null for 1
    int parts;
    bool exact;
    ComputedFor computed_for;
    double* partial;     // [images, kStats, blocks]
    double* grad_stats;  // [images, 1, kStats], for an incoming gradient of 1
    double* whole_divisor;
    T* grad;

    // Fills by_class[C]; a barrier must follow. The image's first block writes its row of grad_stats, that of
    // image 0 the divisor and computed_for.
    template <int Threads, typename A>
    IAL_D void start(const Operands<T>& problem, int64_t image, int block, BackwardClass<A>* by_class) const {
        const double whole = divisor ? sum_blocks(divisor, parts) : 1;
        const double ds = whole != 0 ? 1 / whole : 0, incoming = computed_for.value();
        for (int c = threadIdx.x; c < problem.classes; c += Threads)
            by_class[c] = {A(incoming * ds), A(0), A(0), problem.weight_of(c)};
        if (threadIdx.x > 0 || block > 0) return;
        for (int s = 0; s < kStats; ++s) grad_stats[image * kStats + s] = s == kS ? ds : 0;
        if (image > 0) return;
        *whole_divisor = whole;
        computed_for.write();
    }
};

// Sums over the pixels of a tile. P2 and Q2 are left out: with one level there is no factor.
template <typename A>
struct TileSums {
    A s = 0, weight = 0;
    int count = 0;

    template <typename Tile>
    IAL_D void add(const Tile& tile, int j, const BackwardClass<A>* by_class) {
        const A w = by_class[tile.labels.class_or_any(j)].weight * tile.labels.pixel_weight(j);
        const A term = cross_entropy(tile, j, w);
        if (!tile.labels.has(j)) return;
        s += term;
        weight += w;
        ++count;
    }
};

// The sums of each thread's tiles, in its column of [kRows, Threads] in shared memory: the loops over classes
// need the registers.
template <typename A, int Threads>
struct OneLevelSums {
    A* const sums;
    static constexpr int kRows = 3;  // S, pixels, weight
    static constexpr size_t kBytes = kRows * Threads * sizeof(A);

    IAL_D A* end() const { return sums + kRows * Threads; }
    IAL_D A& at(int row) const { return sums[row * Threads + threadIdx.x]; }

    IAL_D void clear() const {
        for (int row = 0; row < kRows; ++row) at(row) = 0;
    }

    // A label that is neither a class nor ignore_index sets S to NaN: no gradient depends on it.
    IAL_D void add(const TileSums<A>& tile, bool bad_label) const {
        at(0) += bad_label ? A(NAN) : tile.s;
        at(1) += A(tile.count);
        at(2) += tile.weight;
    }

    // Writes the block's sums, each stat `step` after the one before. Barriers before and after.
    IAL_D void total(double* to, int64_t step) const {
        for (int stat = threadIdx.x / kWarp; stat < kStats; stat += Threads / kWarp) {
            const int row = stat == kS ? 0 : stat == kCount ? 1 : stat == kWeight ? 2 : -1;
            const double total = row < 0 ? 0 : sum_row<Threads>(sums + row * Threads);
            if (threadIdx.x % kWarp == 0) to[stat * step] = total;
        }
    }
};

// Blocks that a multiprocessor must hold: three where a tile leaves room for that.
template <typename Tile>
constexpr int kOnePassBlocks = Tile::B <= 19 ? 3 : kMinBlocks;

// Grid (images x blocks).
template <typename Tile>
__global__ void __launch_bounds__(kThreads, kOnePassBlocks<Tile>)
    one_pass_kernel(const __grid_constant__ Problem<typename Tile::T> problem,
                    const __grid_constant__ OnePass<typename Tile::T> call) {
    using T = typename Tile::T;
    using A = typename Tile::A;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    const int64_t image = blockIdx.x / problem.blocks;
    const int block = blockIdx.x % problem.blocks;
    const size_t staged_bytes = problem.staged ? staging_bytes<T>(problem.classes) : 0;
    const Staging<T> staging(ial_shared, problem.classes);
    auto* const by_class = reinterpret_cast<BackwardClass<A>*>(ial_shared + staged_bytes);
    const OneLevelSums<A, kThreads> sums{reinterpret_cast<A*>(by_class + problem.classes)};
    call.template start<kThreads>(problem, image, block, by_class);
    sums.clear();
    __syncthreads();

    Tile tile(problem);
    const GridStride<Tile::V, kThreads> loop(problem.layout, problem.blocks, block);
    for (int64_t i = 0; i < loop.count; ++i)
        differentiate_tile(tile, staging, image, loop.pixel(i), by_class, call.exact, call.grad, [&] {
            TileSums<A> of_tile;
#pragma unroll
            for (int j = 0; j < Tile::V; ++j) of_tile.add(tile, j, by_class);
            sums.add(of_tile, tile.labels.bad);
        });
    __syncthreads();
    sums.total(call.partial + image * kStats * problem.blocks + block, problem.blocks);
}

}  // namespace ial::gpu
