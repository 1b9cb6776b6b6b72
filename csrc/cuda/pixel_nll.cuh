// pixel_nll: the negative log-likelihood of each pixel, weighted and smoothed.
// One read of the logits and one write of the map [images, pixels]. Its backward is reduce_backward.
#pragma once

#include "chunk.cuh"

namespace ial::gpu {

// The value of pixel j of a tile, or 0 if it has no class.
template <typename Tile>
IAL_D typename Tile::A pixel_nll(const Tile& tile, int j, const ReduceClass<typename Tile::A>* by_class) {
    const auto nll = cross_entropy(tile, j, by_class[tile.labels.class_or_any(j)].weight);
    return tile.labels.has(j) ? nll : 0;
}

// Sets `to` to NaN if the label at offset `at` is neither a class nor ignore_index. A tile with such a label
// reads its labels again, so that the other tiles need not know which label it is.
template <typename T, typename A>
IAL_D void mark_bad_label(const Operands<T>& problem, int64_t at, A* to) {
    bool bad = false;
    class_of(load_label(problem.target, problem.label, at), problem.classes, problem.ignore_index, &bad);
    if (bad) *to = NAN;
}

// Grid: images x blocks.
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
            A* const to = map + image * layout.pixels + pixel;
            Pack<A, Tile::V> nll;
#pragma unroll
            for (int j = 0; j < Tile::V; ++j) nll.lane[j] = pixel_nll(tile, j, by_class);
            stream_pack(to, nll);
            if (!tile.labels.bad) return;
            const int64_t labels = layout.offset(layout.target, image, pixel);
            IAL_ROLLED
            for (int j = 0; j < Tile::V; ++j)
                mark_bad_label(problem, labels + j * layout.target.pixel, to + j);
        });
    }
}

// The same grid, for coarse logits. Each pixel is in one chunk.
template <typename Chunk>
__global__ void __launch_bounds__(kThreads, kReduceBlocks<Chunk>)
    pixel_nll_upsampled_kernel(const __grid_constant__ UpsampledProblem<typename Chunk::T> problem,
                               typename Chunk::A* map) {
    using A = typename Chunk::A;
    constexpr int S = Chunk::S;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    auto* const by_class = reinterpret_cast<ReduceClass<A>*>(ial_shared);
    load_classes<kThreads>(problem, 0, by_class);
    __syncthreads();

    const int64_t image = blockIdx.x / problem.blocks;
    const Upsampling& up = problem.upsampling;
    const Image to{up.y.fine * up.x.fine, 0, up.x.fine, 1};
    for_chunks<Chunk>(problem, image, blockIdx.x % problem.blocks, by_class, [&](const Chunk& chunk) {
        const auto& y = chunk.y;
        const auto& x = chunk.x;
#pragma unroll
        for (int j = 0; j < Chunk::V; ++j)
            if (j / S < y.count && j % S < x.count)
                map[to.offset(image, y.first + j / S, x.first + j % S)] = pixel_nll(chunk, j, by_class);
        if (!chunk.labels.bad) return;
        IAL_ROLLED
        for (int i = 0; i < y.count; ++i) IAL_ROLLED
        for (int j = 0; j < x.count; ++j)
            mark_bad_label(problem, up.target.offset(image, y.first + i, x.first + j),
                           map + to.offset(image, y.first + i, x.first + j));
    });
}

}  // namespace ial::gpu
