// reduce_backward: the gradient of the logits from grad_stats = dL/dstats.
// One read of the logits and one write of the gradient.
#pragma once

#include "reduce.cuh"

namespace ial::gpu {

template <typename A>
struct alignas(16) BackwardClass {
    A ds, dp2, dq2;  // grad_stats of the class's level
    A weight;
};

// The incoming gradient of rescale_. grad_stats is then for an incoming gradient of 1. If grad_loss is null,
// grad_stats already includes the incoming gradient.
template <typename A>
struct Incoming {
    const A* grad_loss;
    const double* computed_for;  // the incoming gradient that the gradient was computed for
    double* expected;            // [expected, last], or null

    IAL_D double value() const { return grad_loss ? double(*grad_loss) : 1; }

    // Whether there is nothing to compute. The first thread of the grid updates `expected`, and no other
    // thread reads it. `expected` becomes the incoming gradient if the last one was equal.
    IAL_D bool is_done() const {
        if (!grad_loss) return false;
        const double now = value();
        if (expected && blockIdx.x == 0 && threadIdx.x == 0) {
            if (now == expected[1] && now - now == 0) expected[0] = now;
            expected[1] = now;
        }
        return now == *computed_for;
    }
};

// The incoming gradient that loss_and_grad computes for: `expected`, or 1 if that is null.
struct ComputedFor {
    const double* expected;
    double* computed_for;  // a copy, because `expected` may change before the backward pass

    IAL_D double value() const { return expected ? *expected : 1; }
    IAL_D void write() const { *computed_for = value(); }
};

// The grad_stats [levels, kStats] of an image. If the pointer is null, there is one level, and dL/dS is 1.
static __device__ const double kUnitGradStats[kStats] = {1};
template <typename T>
IAL_D const double* image_grad_stats(const Operands<T>& problem, const double* grad_stats, int64_t image) {
    return grad_stats ? grad_stats + image * problem.levels * kStats : kUnitGradStats;
}

// Fills by_class[C] from the grad_stats [levels, kStats] of an image, times `scale`. The caller must
// synchronise the block afterwards.
template <int Threads, typename T, typename A>
IAL_D void load_classes(const Operands<T>& problem, const double* grad_stats, double scale,
                        BackwardClass<A>* by_class) {
    for (int c = threadIdx.x; c < problem.classes; c += Threads) {
        const double* const row = grad_stats + problem.class_levels[c] * kStats;
        by_class[c] = {A(scaled(row[kS], scale)), A(scaled(row[kP2], scale)), A(scaled(row[kQ2], scale)),
                       problem.weight_of(c)};
    }
}

// The gradient of one pixel of a tile:  dL/dX_c = scale e^(x_c - max) + [c = y] extra - soft w_c, with class
// weights w_c.
template <typename A>
struct TileGradient : PixelGradient<A> {
    A soft = 0;  // used if kSmooth
};

// The gradient of pixel j of a tile. For a pixel without a class, scale and soft are 0.
template <typename Tile>
IAL_D TileGradient<typename Tile::A> differentiate(const Tile& tile, int j,
                                                   const BackwardClass<typename Tile::A>* by_class,
                                                   bool exact) {
    using A = typename Tile::A;
    const BackwardClass<A> target = by_class[tile.labels.class_or_any(j)];
    const A inverse = reciprocal(tile.sum[j]);
    const A v = tile.labels.pixel_weight(j), ce = target.weight * v * target.ds;
    TileGradient<A> pixel{PixelGradient<A>(Tile::kSmooth ? tile.problem.target_share * ce : ce, target.dp2,
                                           target.dq2, tile.target_exp(j) * inverse, exact ? A(1) : A(0))};
    if constexpr (Tile::kSmooth) {
        pixel.soft = tile.labels.has(j) ? tile.problem.class_share * (v * target.ds) : A(0);
        pixel.scale = multiply_add(pixel.soft, tile.weights, pixel.scale);
    }
    pixel.scale = tile.labels.has(j) ? pixel.scale * inverse : A(0);
    return pixel;
}

// Writes the gradient of a tile, with class 0 at `to` and a stride of `channel` between classes.
template <typename Tile>
IAL_D void differentiate(Tile& tile, const BackwardClass<typename Tile::A>* by_class, bool exact,
                         typename Tile::T* to, int64_t channel) {
    using A = typename Tile::A;
    A scale[Tile::V], soft[Tile::V], target_grad[Tile::V];
#pragma unroll
    for (int j = 0; j < Tile::V; ++j) {
        TileGradient<A> pixel = differentiate(tile, j, by_class, exact);
        if constexpr (Tile::kSmooth)
            pixel.extra =
                multiply_add(-pixel.soft, by_class[tile.labels.class_or_any(j)].weight, pixel.extra);
        scale[j] = pixel.scale;
        soft[j] = pixel.soft;
        target_grad[j] = tile.target_exp(j) * pixel.scale + pixel.extra;
    }
    tile.store_gradient(to, channel, scale, soft, target_grad, by_class);
}

// Reads the tile at `pixel` of an image, calls body(), and writes the gradient. All lanes of a warp must call
// this function.
template <typename Tile, typename Body>
IAL_D void differentiate_tile(Tile& tile, const Staging<typename Tile::T>& staging, int64_t image,
                              int64_t pixel, const BackwardClass<typename Tile::A>* by_class, bool exact,
                              typename Tile::T* grad, const Body& body) {
    const Layout& layout = tile.problem.layout;
    const View& view = layout.grad;
    const bool staged = is_staged(tile);
    read_tile(tile, staging, image, pixel, by_class, [&] {
        body();
        differentiate(tile, by_class, exact,
                      staged ? staging.row() : grad + layout.offset(view, image, pixel), view.channel);
    });
    if (staged) staging.store(grad + image * view.batch, pixel, layout.pixels);
}

// Grid: images x blocks. Images, and the tiles of a block, are processed in reverse order, because L2 still
// holds what reduce read last. grad may be the logits: a thread reads its tile, or the classes of a pass,
// before it writes them. grad_stats: [images, levels, kStats], or null.
template <typename Tile>
__global__ void __launch_bounds__(kThreads, kTileBlocks<Tile>)
    reduce_backward_kernel(const __grid_constant__ Problem<typename Tile::T> problem,
                           const double* grad_stats,
                           const __grid_constant__ Incoming<typename Tile::A> incoming, bool exact,
                           typename Tile::T* grad) {
    using T = typename Tile::T;
    using A = typename Tile::A;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    const unsigned index = gridDim.x - 1 - blockIdx.x;
    const int64_t image = index / problem.blocks;
    if (incoming.is_done()) return;

    const size_t staged_bytes = problem.staged ? staging_bytes<T>(problem.classes) : 0;
    const Staging<T> staging(ial_shared, problem.classes);
    auto* const by_class = reinterpret_cast<BackwardClass<A>*>(ial_shared + staged_bytes);
    load_classes<kThreads>(problem, image_grad_stats(problem, grad_stats, image), incoming.value(), by_class);
    __syncthreads();

    Tile tile(problem);
    const GridStride<Tile::V, kThreads> loop(problem.layout, problem.blocks, index % problem.blocks);
    for (int64_t i = loop.count - 1; i >= 0; --i)
        differentiate_tile(tile, staging, image, loop.pixel(i), by_class, exact, grad, [] {});
}

}  // namespace ial::gpu
