// The loss of one level and its gradient, in one read of the logits and one write of the gradient.
// The gradient needs no sum over the logits. It needs the divisor of the mean, which depends on labels and
// weights alone.
#pragma once

#include "backward.cuh"

namespace ial::gpu {

// Threads of a block of weight_kernel. One block per multiprocessor keeps its memory busy, and leaves few
// partial sums to add.
constexpr int kWeightThreads = 1024;

// The weight of the valid pixels: each block writes one part to parts[gridDim.x]. Only the labels and weights
// of `problem` are used, and its layout is theirs.
template <typename T, int V>
__global__ void __launch_bounds__(kWeightThreads)
    weight_kernel(const __grid_constant__ Problem<T> problem, double* parts) {
    extern __shared__ __align__(16) unsigned char ial_shared[];
    auto* const warp_sums = reinterpret_cast<double*>(ial_shared);
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
    if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = total;
    __syncthreads();
    if (threadIdx.x >= kWarp) return;
    total = warp_sum(warp_sums[threadIdx.x]);
    if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

template <typename T>
struct OnePass {
    const double* divisor;  // [parts]: parts of what the loss is divided by; null: 1
    int parts;
    bool exact;
    ComputedFor computed_for;
    double* partial;     // [images, kStats, blocks]
    double* grad_stats;  // [images, 1, kStats], for an incoming gradient of 1
    double* whole_divisor;
    T* grad;

    // Fills by_class[C]. The caller must synchronise the block afterwards. The first block of each image
    // writes the image's row of grad_stats. The first block of image 0 also writes the divisor and
    // computed_for.
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

// Sums over the pixels of a tile. P2 and Q2 are left out, because one level has no factors.
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

// The sums of each thread's tiles. Each thread has a column of [kRows, Threads] in shared memory, because the
// loops over the classes need the registers.
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

    // A label that is neither a class nor ignore_index sets S to NaN. No gradient depends on S.
    IAL_D void add(const TileSums<A>& tile, bool bad_label) const {
        at(0) += bad_label ? A(NAN) : tile.s;
        at(1) += A(tile.count);
        at(2) += tile.weight;
    }

    // Writes the block's sums to `to`, with a stride of `step` between stats. The caller must synchronise the
    // block before and after.
    IAL_D void total(double* to, int64_t step) const {
        for (int stat = threadIdx.x / kWarp; stat < kStats; stat += Threads / kWarp) {
            const int row = stat == kS ? 0 : stat == kCount ? 1 : stat == kWeight ? 2 : -1;
            const double total = row < 0 ? 0 : sum_row<Threads>(sums + row * Threads);
            if (threadIdx.x % kWarp == 0) to[stat * step] = total;
        }
    }
};

// Grid: images x blocks.
template <typename Tile>
__global__ void __launch_bounds__(kThreads, kTileBlocks<Tile>)
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
            TileSums<A> tile_sums;
#pragma unroll
            for (int j = 0; j < Tile::V; ++j) tile_sums.add(tile, j, by_class);
            sums.add(tile_sums, tile.labels.bad);
        });
    __syncthreads();
    sums.total(call.partial + image * kStats * problem.blocks + block, problem.blocks);
}

}  // namespace ial::gpu
