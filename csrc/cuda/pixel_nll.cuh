// pixel_nll: the negative log-likelihood of each pixel, weighted and smoothed.
// One read of the logits and one write of the map [images, pixels]. Its backward is reduce_backward.
#pragma once

#include "chunk.cuh"

namespace ial::gpu {

// The value of pixel j of a tile. 0 for a pixel without a class, but NaN if its label, at `label`, is not
// ignore_index.
template <typename Tile>
IAL_D typename Tile::A pixel_nll(const Tile& tile, int j, const ReduceClass<typename Tile::A>* by_class,
                                 int64_t label) {
    using A = typename Tile::A;
    const auto& problem = tile.problem;
    const A nll = cross_entropy(tile, j, by_class[tile.labels.class_or_any(j)].weight);
    if (tile.labels.has(j)) return nll;
    const bool bad =
        tile.labels.bad && load_label(problem.target, problem.label, label) != problem.ignore_index;
    return bad ? A(NAN) : A(0);
}

// Grid: images x blocks. The map is stored in the caches, because the next operation reads it.
template <typename Tile>
__global__ void __launch_bounds__(kThreads, kTileBlocks<Tile>)
    pixel_nll_kernel(const __grid_constant__ Problem<typename Tile::T> problem, typename Tile::A* map) {
    using T = typename Tile::T;
    using A = typename Tile::A;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    const size_t staged_bytes = problem.staged ? staging_bytes<T>(problem.classes) : 0;
    const Staging<T> staging(ial_shared, problem.classes);
    auto* const by_class = reinterpret_cast<ReduceClass<A>*>(ial_shared + staged_bytes);
    load_classes<kThreads>(problem, 0, by_class);
    __syncthreads();

    const Layout& layout = problem.layout;
    const int64_t image = blockIdx.x / problem.blocks;
    Tile tile(problem);
    const GridStride<Tile::V, kThreads> loop(layout, problem.blocks, blockIdx.x % problem.blocks);
    for (int64_t i = 0; i < loop.count; ++i) {
        const int64_t pixel = loop.pixel(i);
        read_tile(tile, staging, image, pixel, by_class, [&] {
            const int64_t label = layout.offset(layout.target, image, pixel);
            Pack<A, Tile::V> nll;
#pragma unroll
            for (int j = 0; j < Tile::V; ++j)
                nll.lane[j] = pixel_nll(tile, j, by_class, label + j * layout.target.pixel);
            store_pack(map + image * layout.pixels + pixel, nll);
        });
    }
}

// The same grid, for coarse logits. Each pixel is in one chunk.
template <typename Chunk>
__global__ void __launch_bounds__(kThreads, kReduceBlocks<Chunk>)
    pixel_nll_upsampled_kernel(const __grid_constant__ UpsampledProblem<typename Chunk::T> problem,
                               typename Chunk::A* map) {
    using A = typename Chunk::A;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    auto* const by_class = reinterpret_cast<ReduceClass<A>*>(ial_shared);
    load_classes<kThreads>(problem, 0, by_class);
    __syncthreads();

    const Upsampling& up = problem.upsampling;
    const int64_t image = blockIdx.x / problem.blocks;
    for_chunks<Chunk>(problem, image, blockIdx.x % problem.blocks, by_class, [&](const Chunk& chunk) {
#pragma unroll
        for (int j = 0; j < Chunk::V; ++j) {
            if (j / Chunk::S >= chunk.y.count || j % Chunk::S >= chunk.x.count) continue;
            const int64_t y = chunk.y.first + j / Chunk::S, x = chunk.x.first + j % Chunk::S;
            map[(image * up.y.fine + y) * up.x.fine + x] =
                pixel_nll(chunk, j, by_class, up.target.offset(image, y, x));
        }
    });
}

}  // namespace ial::gpu
