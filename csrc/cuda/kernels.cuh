// The CUDA kernels. They see plain structs, never a tensor; who launches them, and on what, is not their
// business (cuda/launch.h). Which thread adds what depends on the grid alone, and sums are added in a fixed
// order without atomics, so a result is bitwise the same from run to run.
#pragma once

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#endif

#include "tile.cuh"

namespace ial {
namespace gpu {

#if defined(__CUDACC__)
// Waits for all blocks of a cooperative launch; what they wrote before is seen after.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }
#endif

// Blocks of reduce and gradient that a multiprocessor must hold: it leaves a thread all 255 registers.
// Without a number the compiler aims at more blocks, at the price of a few spills.
constexpr int kLeastBlocks = 2;

// -------------------------------------------------------------------------------------------------
// Sums over the pixels of a block

template <typename A>
struct ReduceClass {
    A weight;
    int level;  // counted from the first one that the block sums
};

// Fills by_class[C]; a barrier must follow.
template <int Threads, typename T, typename A>
IAL_D void load_classes(const Operands<T>& problem, int first_level, ReduceClass<A>* by_class) {
    for (int c = threadIdx.x; c < problem.classes; c += Threads)
        by_class[c] = {problem.weight_of(c), problem.class_levels[c] - first_level};
}

// columns[levels, kStats, Threads] in shared memory: every thread adds to a column of its own.
template <typename A, int Threads>
struct Columns {
    A* const columns;
    const int levels;

    IAL_D void clear() const {
        for (int slot = 0; slot < levels * kStats; ++slot) columns[slot * Threads + threadIdx.x] = 0;
    }

    // One warp for each of the sums: to[i * step] = the sum of row i. Barriers before and after.
    IAL_D void total(double* to, int64_t step) const {
        const int lane = threadIdx.x % kWarp;
        for (int slot = threadIdx.x / kWarp; slot < levels * kStats; slot += Threads / kWarp) {
            double total = 0;
            for (int i = lane; i < Threads; i += kWarp) total += columns[slot * Threads + i];
            total = warp_sum(total);
            if (lane == 0) to[slot * step] = total;
        }
    }

    static constexpr size_t bytes(int levels) { return size_t(levels) * kStats * Threads * sizeof(A); }
};

// Sums of pixels of one level in a row, in registers until the level changes: labels come in patches. Then
// they join the thread's column.
template <typename A, int Threads>
struct Run {
    A* const column;
    const int levels;
    int level = -1;
    A sums[kStats] = {};

    IAL_D explicit Run(const Columns<A, Threads>& columns)
        : column(columns.columns + threadIdx.x), levels(columns.levels) {}

    template <typename Tile>
    IAL_D void add(const Tile& tile, const ReduceClass<A>* by_class) {
#pragma unroll
        for (int j = 0; j < Tile::V; ++j) {
            const ReduceClass<A> its = by_class[tile.labels.some_class(j)];
            const A w = its.weight * tile.labels.pixel_weight(j);
            const A s = w * (logarithm(tile.sum[j]) - tile.target[j]);
            const A pi = tile.own(j) * reciprocal(tile.sum[j]);
            if (!tile.labels.has(j) || its.level < 0 || its.level >= levels) continue;
            if (its.level != level) {
                flush();
                level = its.level;
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

    // A label that is neither a class nor ignore_index makes S_0, which no gradient depends on, NaN.
    IAL_D void spoil() const { column[kS * Threads] = NAN; }
};

// -------------------------------------------------------------------------------------------------
// reduce

// What every kernel does that sums. Grid (images x blocks, groups of levels): what a block has shared memory
// for are `block_levels` levels, and further groups read the logits again. body(image, block, add) calls
// add(tile) for each tile of the thread's. partial: [images, levels, kStats, blocks].
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
    const Columns<A, kThreads> columns{reinterpret_cast<A*>(by_class + problem.classes), levels};
    columns.clear();
    __syncthreads();

    Run<A, kThreads> run(columns);
    bool bad_label = false;
    body(image, block, [&](const auto& tile) {
        bad_label |= tile.labels.bad;
        run.add(tile, by_class);
    });
    run.flush();
    if (bad_label && first_level == 0) run.spoil();
    __syncthreads();
    columns.total(partial + (image * problem.levels + first_level) * kStats * problem.blocks + block,
                  problem.blocks);
}

template <typename Tile>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    reduce_kernel(const __grid_constant__ Problem<typename Tile::T> problem, int block_levels,
                  double* partial) {
    using T = typename Tile::T;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    const size_t slabs = problem.staged ? slab_bytes<T>(problem.classes) : 0;
    const Slab<T> slab(ial_shared, problem.classes);
    sum_levels(
        problem, ial_shared + slabs, block_levels, partial, [&](int64_t image, int block, const auto& add) {
            Tile tile(problem);
            const Rounds<Tile::V, kThreads> rounds(problem.layout, problem.blocks, block);
            const View& view = problem.layout.logits;
            for (int64_t round = 0; round < rounds.count; ++round) {
                const int64_t pixel = rounds.pixel(round);
                const bool staged = Tile::V == 1 && problem.staged;
                if (staged) slab.load(problem.logits + image * view.batch, pixel, problem.layout.pixels);
                if (pixel >= problem.layout.pixels) continue;
                tile.read(image, pixel,
                          staged ? slab.own() : problem.logits + problem.layout.offset(view, image, pixel),
                          view.channel);
                add(tile);
            }
        });
}

// What `blocks` blocks left of a sum, added by the lanes of a warp; past L1, which may hold what was there
// before.
IAL_D double sum_blocks(const double* partial, int blocks) {
    double total = 0;
    for (int b = threadIdx.x % kWarp; b < blocks; b += kWarp) total += __ldcg(partial + b);
    return warp_sum(total);
}

// One warp for each of the sums: stats[i] = sum over b of partial[i, b]
static __global__ void __launch_bounds__(kWarp) sum_kernel(const double* partial, int blocks, double* stats) {
    const double total = sum_blocks(partial + int64_t(blockIdx.x) * blocks, blocks);
    if (threadIdx.x == 0) stats[blockIdx.x] = total;
}

// -------------------------------------------------------------------------------------------------
// gradient

template <typename A>
struct alignas(16) GradientClass {
    A ds, dp2, dq2;  // dL/dstats of its level
    A weight;
};

// Fills by_class[C] from the rows of an image, [levels, kStats], times `scale`; a barrier must follow.
template <int Threads, typename T, typename A>
IAL_D void load_classes(const Operands<T>& problem, const double* rows, double scale,
                        GradientClass<A>* by_class) {
    for (int c = threadIdx.x; c < problem.classes; c += Threads) {
        const double* const row = rows + problem.class_levels[c] * kStats;
        by_class[c] = {A(scale * row[kS]), A(scale * row[kP2]), A(scale * row[kQ2]), problem.weight_of(c)};
    }
}

// Of pixel j of a tile, whose `scale` is that of e^(x_c - max); 0 where it has no class.
template <typename Tile>
IAL_D PixelGradient<typename Tile::A> differentiate(const Tile& tile, int j,
                                                    const GradientClass<typename Tile::A>* by_class,
                                                    bool exact) {
    using A = typename Tile::A;
    const GradientClass<A> its = by_class[tile.labels.some_class(j)];
    const A inverse = reciprocal(tile.sum[j]);
    const A w = its.weight * tile.labels.pixel_weight(j);
    PixelGradient<A> pixel(w * its.ds, its.dp2, its.dq2, tile.own(j) * inverse, exact ? A(1) : A(0));
    pixel.scale = tile.labels.has(j) ? pixel.scale * inverse : A(0);
    return pixel;
}

// The gradient of a tile, to its pixels' class 0 at `to` and the others `channel` apart.
template <typename Tile>
IAL_D void differentiate(Tile& tile, const GradientClass<typename Tile::A>* by_class, bool exact,
                         typename Tile::T* to, int64_t channel) {
    using A = typename Tile::A;
    A scale[Tile::V], own[Tile::V];
#pragma unroll
    for (int j = 0; j < Tile::V; ++j) {
        const PixelGradient<A> pixel = differentiate(tile, j, by_class, exact);
        scale[j] = pixel.scale;
        own[j] = tile.own(j) * pixel.scale + pixel.extra;
    }
    tile.store_gradient(to, channel, scale, own);
}

// Grid (images x blocks). Images, and the tiles of a block, go backwards: L2 still has what reduce read last.
// grad may be the logits themselves: a thread reads all of its tile before it writes, or, where classes take
// turns, each turn before it is overwritten. table: [images, levels, kStats]; where grad_loss is given, for
// an incoming gradient of 1, for which grad is there already: if it is 1 nothing is left to be done.
template <typename Tile>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    gradient_kernel(const __grid_constant__ Problem<typename Tile::T> problem, const double* table,
                    const typename Tile::A* grad_loss, bool exact, typename Tile::T* grad) {
    using T = typename Tile::T;
    using A = typename Tile::A;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    const unsigned index = gridDim.x - 1 - blockIdx.x;
    const int64_t image = index / problem.blocks;
    const A incoming = grad_loss ? *grad_loss : A(1);
    if (grad_loss && incoming == 1) return;

    const size_t slabs = problem.staged ? slab_bytes<T>(problem.classes) : 0;
    const Slab<T> slab(ial_shared, problem.classes);
    auto* const by_class = reinterpret_cast<GradientClass<A>*>(ial_shared + slabs);
    load_classes<kThreads>(problem, table + image * problem.levels * kStats, incoming, by_class);
    __syncthreads();

    Tile tile(problem);
    const Rounds<Tile::V, kThreads> rounds(problem.layout, problem.blocks, index % problem.blocks);
    const View &logits = problem.layout.logits, &view = problem.layout.grad;
    for (int64_t round = rounds.count - 1; round >= 0; --round) {
        const int64_t pixel = rounds.pixel(round);
        const bool staged = Tile::V == 1 && problem.staged;
        if (staged) slab.load(problem.logits + image * logits.batch, pixel, problem.layout.pixels);
        if (pixel < problem.layout.pixels) {
            tile.read(image, pixel,
                      staged ? slab.own() : problem.logits + problem.layout.offset(logits, image, pixel),
                      logits.channel);
            differentiate(tile, by_class, exact,
                          staged ? slab.own() : grad + problem.layout.offset(view, image, pixel),
                          view.channel);
        }
        if (staged) slab.store(grad + image * view.batch, pixel, problem.layout.pixels);
    }
}

// -------------------------------------------------------------------------------------------------
// combine and table: one block, a thread an image

struct Lambdas {
    double value[kMaxLevels - 1];
};

// The sums that every thread will read, brought nearer where there is room for them.
IAL_D const double* staged(const Combine& c, bool fits) {
    extern __shared__ __align__(16) unsigned char ial_shared[];
    if (!fits) return c.stats;
    double* const near = reinterpret_cast<double*>(ial_shared);
    for (int64_t i = threadIdx.x; i < c.batch * c.levels * kStats; i += blockDim.x) near[i] = c.stats[i];
    __syncthreads();
    return near;
}

// What combine leaves. f: [N or 1, g - 1]; image_losses: [N]; loss: [N] or [1]
template <typename L>
struct Combined {
    double *f, *image_losses;
    L* loss;

    IAL_D void write(const Combine& c) const {
        if (c.pool_batch) {
            if (threadIdx.x == 0) factors(c, 0, c.batch, f);
            __syncthreads();
        }
        for (int64_t n = threadIdx.x; n < c.batch; n += blockDim.x) {
            double* const own = c.pool_batch ? f : f + n * (c.levels - 1);
            if (!c.pool_batch) factors(c, n, n + 1, own);
            image_losses[n] = image_loss(c, n, own);
            if (c.reduction == Reduction::kNone) loss[n] = static_cast<L>(image_losses[n]);
        }
        __syncthreads();
        if (c.reduction == Reduction::kNone || threadIdx.x > 0) return;
        double total = 0;
        for (int64_t n = 0; n < c.batch; ++n) total += image_losses[n];
        const double weight = c.reduction == Reduction::kMean ? c.weight() : 1;
        *loss = static_cast<L>(weight != 0 ? total / weight : 0);
    }
};

template <typename L>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Combine c, const __grid_constant__ Lambdas lambdas, bool fits, Combined<L> to) {
    c.lambdas = lambdas.value;
    c.stats = staged(c, fits);
    to.write(c);
}

// Each image's rows of `to` by a thread of the block.
template <typename Grads>
IAL_D void write_table(const Combine& c, const Grads& grad_loss, double weight, double* to) {
    if (!c.pool_batch)
        for (int64_t n = threadIdx.x; n < c.batch; n += blockDim.x)
            combine_backward(c, n, n + 1, grad_loss, weight, to);
    else if (threadIdx.x == 0)
        combine_backward(c, 0, c.batch, grad_loss, weight, to);
}

template <typename G>
__global__ void __launch_bounds__(kThreads) table_kernel(Combine c, const __grid_constant__ Lambdas lambdas,
                                                         bool fits, const G* grad_loss, double* to) {
    c.lambdas = lambdas.value;
    c.stats = staged(c, fits);
    write_table(c, grad_loss, c.weight(), to);
}

// -------------------------------------------------------------------------------------------------
// fused: reduce, combine, table and gradient in one cooperative launch

// Threads of a block, the only one on its multiprocessor: as many as have registers for a tile.
template <typename Tile>
constexpr int kFusedThreads = Tile::B * sizeof(Pack<typename Tile::T, Tile::V>) <= 192 ? 384 : 256;

// dL/dloss = 1, before anyone knows it.
struct One {
    IAL_HD double operator[](int64_t) const { return 1; }
};

template <typename T>
struct Fused {
    using A = typename Arithmetic<T>::A;

    Combine combine;        // of the batch
    double *stats, *table;  // [N, levels, kStats]; the table for an incoming gradient of 1
    Combined<A> results;
    double* partial;       // [2, images of a wave, levels, kStats, blocks]
    const double* weight;  // [weights], which add up to the batch's, or null where the wave is the batch
    int weights;
    int64_t wave;  // images that are worked on at a time
    int64_t kept;  // tiles of a thread that shared memory keeps from reduce to gradient
    bool exact;
    T* grad;
};

// Where things lie in a block's shared memory, in bytes. What the sums of a wave are added up from makes room
// for them.
template <typename Tile>
struct FusedShared {
    size_t slots;             // [kept, classes, threads] packs
    size_t gradient_classes;  // [classes]
    size_t columns;           // [levels, kStats, threads], and later
    size_t stats, table;      // [wave, levels, kStats]
    size_t reduce_classes;    // [classes]
    size_t end;

    IAL_HD FusedShared(int64_t classes, int levels, int64_t wave, int64_t kept) {
        using A = typename Tile::A;
        const size_t row = kStats * sizeof(double), rows = wave * levels * row;
        const size_t sums = size_t(levels) * kStats * kFusedThreads<Tile> * sizeof(A);
        slots = 0;
        gradient_classes = kept * classes * kFusedThreads<Tile> * sizeof(Pack<typename Tile::T, Tile::V>);
        columns = stats = gradient_classes + classes * sizeof(GradientClass<A>);
        table = stats + rows;
        reduce_classes = columns + (sums > 2 * rows ? sums : 2 * rows);
        end = reduce_classes + classes * sizeof(ReduceClass<A>);
    }
};

// A batch goes through in waves of so many images as stay on the chip between their reduce and their
// gradient, each on `blocks` blocks. Of its tiles, a thread keeps the first in shared memory and the last in
// registers; those between, which it reads again in reversed order, are what L2 saw last.
template <typename Tile>
__global__ void __launch_bounds__(kFusedThreads<Tile>, 1)
    fused_kernel(const __grid_constant__ Problem<typename Tile::T> problem,
                 const __grid_constant__ Fused<typename Tile::T> fused,
                 const __grid_constant__ Lambdas lambdas) {
    using T = typename Tile::T;
    using A = typename Tile::A;
    constexpr int Threads = kFusedThreads<Tile>;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    const Layout& layout = problem.layout;
    const FusedShared<Tile> at(layout.classes, problem.levels, fused.wave, fused.kept);
    auto* const slots = reinterpret_cast<T*>(ial_shared + at.slots);
    auto* const gradient_classes = reinterpret_cast<GradientClass<A>*>(ial_shared + at.gradient_classes);
    const Columns<A, Threads> columns{reinterpret_cast<A*>(ial_shared + at.columns), problem.levels};
    auto* const stats = reinterpret_cast<double*>(ial_shared + at.stats);
    auto* const table = reinterpret_cast<double*>(ial_shared + at.table);
    auto* const reduce_classes = reinterpret_cast<ReduceClass<A>*>(ial_shared + at.reduce_classes);
    const int sums = problem.levels * kStats;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t own = blockIdx.x / problem.blocks;  // image of a wave
    const Rounds<Tile::V, Threads> rounds(layout, problem.blocks, blockIdx.x % problem.blocks);
    const auto slot = [&](int64_t round) {
        return slots + (round * layout.classes * Threads + threadIdx.x) * Tile::V;
    };
    load_classes<Threads>(problem, 0, reduce_classes);

    Tile tile(problem);
    int parity = 0;  // of the wave: one may still be reading `partial` while another writes the next wave's
    for (int64_t first = 0; first < layout.batch; first += fused.wave, parity ^= 1) {
        const int64_t images = fused.wave < layout.batch - first ? fused.wave : layout.batch - first;
        const int64_t image = first + own, count = own < images ? rounds.count : 0;
        const auto logits = [&](int64_t pixel) {
            return problem.logits + layout.offset(layout.logits, image, pixel);
        };
        double* const partial = fused.partial + parity * fused.wave * sums * problem.blocks;

        columns.clear();
        __syncthreads();
        Run<A, Threads> run(columns);
        bool bad_label = false;
        for (int64_t round = 0; round < count; ++round) {
            const int64_t pixel = rounds.pixel(round);
            if (pixel >= layout.pixels) break;
            tile.read(image, pixel, logits(pixel), layout.logits.channel);
            bad_label |= tile.labels.bad;
            run.add(tile, reduce_classes);
            if (round < fused.kept) tile.keep(slot(round), Threads * Tile::V);
        }
        run.flush();
        if (bad_label) run.spoil();
        __syncthreads();
        columns.total(partial + own * sums * problem.blocks + blockIdx.x % problem.blocks, problem.blocks);
        grid_barrier();

        for (int64_t i = warp; i < images * sums; i += Threads / kWarp) {
            const double sum = sum_blocks(partial + i * problem.blocks, problem.blocks);
            if (lane == 0) stats[i] = sum;
        }
        __syncthreads();
        Combine combine = fused.combine;
        combine.lambdas = lambdas.value;
        combine.stats = stats;
        combine.batch = images;
        const double weight = fused.weight ? sum_blocks(fused.weight, fused.weights) : combine.weight();
        write_table(combine, One(), weight, table);
        __syncthreads();
        if (blockIdx.x == 0)
            for (int64_t i = threadIdx.x; i < images * sums; i += Threads) {
                fused.stats[first * sums + i] = stats[i];
                fused.table[first * sums + i] = table[i];
            }
        if (count > 0) load_classes<Threads>(problem, table + own * sums, 1, gradient_classes);
        __syncthreads();

        for (int64_t round = count - 1; round >= 0; --round) {
            const int64_t pixel = rounds.pixel(round);
            if (pixel >= layout.pixels) continue;
            const bool here = round < fused.kept;
            if (round < count - 1)
                tile.read(image, pixel, here ? slot(round) : logits(pixel),
                          here ? Threads * Tile::V : layout.logits.channel);
            differentiate(tile, gradient_classes, fused.exact,
                          fused.grad + layout.offset(layout.grad, image, pixel), layout.grad.channel);
        }
    }
    if (blockIdx.x > 0) return;
    Combine combine = fused.combine;
    combine.lambdas = lambdas.value;
    combine.stats = fused.stats;
    fused.results.write(combine);
}

// The weights of the valid pixels: block b's share in weight[b]. Grid: any, of kThreads.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    weigh_kernel(const __grid_constant__ Problem<T> problem, double* weight) {
    extern __shared__ __align__(16) unsigned char ial_shared[];
    auto* const of_warp = reinterpret_cast<double*>(ial_shared);
    const Layout& layout = problem.layout;
    const int64_t tiles = layout.pixels / V, step = int64_t(gridDim.x) * kThreads;
    double total = 0;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < layout.batch * tiles; i += step) {
        Labels<T, V> labels;
        labels.read(problem, i / tiles, i % tiles * V);
        for (int j = 0; j < V; ++j)
            if (labels.label[j] >= 0) total += problem.weight_of(labels.label[j]) * labels.pixel_weight(j);
    }
    total = warp_sum(total);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = total;
    __syncthreads();
    if (threadIdx.x > 0) return;
    total = 0;
    for (int i = 0; i < kThreads / kWarp; ++i) total += of_warp[i];
    weight[blockIdx.x] = total;
}

}  // namespace gpu
}  // namespace ial
