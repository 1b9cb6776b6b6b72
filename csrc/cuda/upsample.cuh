// reduce and its backward for coarse logits.
// The kernels upsample the logits to the size of the target.
#pragma once

#include "chunk.cuh"
#include "one_pass.cuh"

namespace ial::gpu {

// -------------------------------------------------------------------------------------------------
// reduce, with the grid and `partial` of sum_levels().

template <typename Chunk>
__global__ void __launch_bounds__(kThreads, kReduceBlocks<Chunk>)
    reduce_upsampled_kernel(const __grid_constant__ UpsampledProblem<typename Chunk::T> problem,
                            int block_levels, double* partial) {
    extern __shared__ __align__(16) unsigned char ial_shared[];
    sum_levels(problem, ial_shared, block_levels, partial,
               [&](int64_t image, int block, const auto* by_class, const auto& add) {
                   for_chunks<Chunk>(problem, image, block, by_class, add);
               });
}

// -------------------------------------------------------------------------------------------------
// reduce_backward: a block has a rectangle of cells, with one warp per row. It writes the gradient of the
// logits whose four cells are all inside. Neighbouring rectangles therefore overlap by one row or column of
// cells. Each class is summed over each cell, and then over the four cells around each logit.

struct CellGrid {
    int lanes;          // threads per cell, which share its chunks
    int pass_classes;   // classes that shared memory holds at a time
    int rows, columns;  // rectangles of an image

    IAL_HD int cells() const { return kWarp / lanes; }        // in a row of a rectangle
    IAL_HD int rectangles() const { return rows * columns; }  // per image
};

// The contributions of a block's threads to the corners of their cells, for the classes of a pass.
// sums: [4, pass_classes, kCellThreads].
template <typename A>
struct CornerSums {
    A* const sums;
    const int pass_classes;

    IAL_D A& at(int corner, int i, int thread) const {
        return sums[(corner * pass_classes + i) * kCellThreads + thread];
    }
    IAL_D void clear(int i) const {
        for (int corner = 0; corner < 4; ++corner) at(corner, i, threadIdx.x) = 0;
    }
    IAL_D void add(int i, const Corners<A>& by) const {
        at(0, i, threadIdx.x) += by.top_left;
        at(1, i, threadIdx.x) += by.top_right;
        at(2, i, threadIdx.x) += by.bottom_left;
        at(3, i, threadIdx.x) += by.bottom_right;
    }

    // The sum for the logit at the top left of a cell. The cell's first thread is `first`.
    IAL_D A total(int i, int first, int lanes) const {
        A total = 0;
        for (int t = first; t < first + lanes; ++t)
            total += at(0, i, t) + at(1, i, t - lanes) + at(2, i, t - kWarp) + at(3, i, t - kWarp - lanes);
        return total;
    }

    static constexpr size_t bytes(int pass_classes) { return sizeof(A) * 4 * pass_classes * kCellThreads; }
};

// Writes the gradient of the logits of a block's rectangle. start(chunk, extra, is_own) begins the backward
// of a chunk that has labels. Several blocks may have the same chunk, and is_own is set in exactly one of
// them. shared: [V, kCellThreads] for `extra`, then CornerSums.
template <typename Chunk, typename Start>
IAL_D void differentiate_cells(const UpsampledProblem<typename Chunk::T>& problem, const CellGrid& grid,
                               typename Chunk::A* shared, typename Chunk::T* grad, const Start& start) {
    using A = typename Chunk::A;
    const int image = blockIdx.x / grid.rectangles(), rectangle = blockIdx.x % grid.rectangles();
    const int row = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int cell = lane / grid.lanes, lane_of_cell = lane % grid.lanes;
    const int y = rectangle / grid.columns * (kCellRows - 1) + row - 1;
    const int x = rectangle % grid.columns * (grid.cells() - 1) + cell - 1;
    const bool is_cell =
        cell < grid.cells() && y < problem.upsampling.y.coarse && x < problem.upsampling.x.coarse;
    A* const extra = shared + threadIdx.x;
    const CornerSums<A> sums{shared + Chunk::V * kCellThreads, grid.pass_classes};

    Chunk chunk(problem);
    const int parts = problem.parts_y * problem.parts_x;
    for (int first = 0; first < problem.classes; first += grid.pass_classes) {
        const int count =
            grid.pass_classes < problem.classes - first ? grid.pass_classes : problem.classes - first;
        if (is_cell) {
            for (int i = 0; i < count; ++i) sums.clear(i);
            for (int part = lane_of_cell; part < parts; part += grid.lanes) {
                const bool is_new = first == 0 || parts > grid.lanes;
                if (is_new) chunk.read(image, y, part / problem.parts_x, x, part % problem.parts_x);
                if (!chunk.labels.any()) continue;
                // The rectangles above and to the left also have the first row and column.
                if (is_new) start(chunk, extra, first == 0 && (row > 0 || y < 0) && (cell > 0 || x < 0));
                if (chunk.careful) {
#pragma unroll
                    for (int j = 0; j < Chunk::S; ++j)
#pragma unroll 1
                        for (int i = 0; i < count; ++i) sums.add(i, chunk.careful_gradient(j, first + i));
                    continue;
                }
#pragma unroll 1
                for (int i = 0; i < count; ++i) sums.add(i, chunk.gradient(first + i));
            }
        }
        __syncthreads();
        if (is_cell && row > 0 && cell > 0) {
            const Image& view = problem.upsampling.grad;
            typename Chunk::T* const to = grad + view.offset(image, y, x);
            for (int i = lane_of_cell; i < count; i += grid.lanes)
                narrow(sums.total(i, threadIdx.x - lane_of_cell, grid.lanes),
                       to + (first + i) * view.channel);
        }
        __syncthreads();
    }
}

// Grid: images x rectangles. grad_stats as in reduce_backward_kernel.
template <typename Chunk>
__global__ void __launch_bounds__(kCellThreads, 2)
    reduce_backward_upsampled_kernel(const __grid_constant__ UpsampledProblem<typename Chunk::T> problem,
                                     const __grid_constant__ CellGrid grid, const double* grad_stats,
                                     const __grid_constant__ Incoming<typename Chunk::A> incoming, bool exact,
                                     typename Chunk::T* grad) {
    using A = typename Chunk::A;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    if (incoming.is_done()) return;
    const int64_t image = blockIdx.x / grid.rectangles();
    auto* const by_class = reinterpret_cast<BackwardClass<A>*>(ial_shared);
    load_classes<kCellThreads>(problem, image_grad_stats(problem, grad_stats, image), incoming.value(),
                               by_class);
    __syncthreads();
    differentiate_cells<Chunk>(problem, grid, reinterpret_cast<A*>(by_class + problem.classes), grad,
                               [&](Chunk& chunk, A* extra, bool) {
                                   chunk.softmax(by_class);
                                   chunk.start_backward(by_class, exact, extra, [](int) {});
                               });
}

// The same grid, for one level.
template <typename Chunk>
__global__ void __launch_bounds__(kCellThreads, 2)
    one_pass_upsampled_kernel(const __grid_constant__ UpsampledProblem<typename Chunk::T> problem,
                              const __grid_constant__ CellGrid grid,
                              const __grid_constant__ OnePass<typename Chunk::T> call) {
    using A = typename Chunk::A;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    const int64_t image = blockIdx.x / grid.rectangles();
    const int rectangle = blockIdx.x % grid.rectangles();
    auto* const by_class = reinterpret_cast<BackwardClass<A>*>(ial_shared);
    const OneLevelSums<A, kCellThreads> sums{reinterpret_cast<A*>(by_class + problem.classes)};
    call.template start<kCellThreads>(problem, image, rectangle, by_class);
    sums.clear();
    __syncthreads();
    differentiate_cells<Chunk>(problem, grid, sums.end(), call.grad,
                               [&](Chunk& chunk, A* extra, bool is_own) {
                                   chunk.softmax(by_class);
                                   TileSums<A> chunk_sums;
                                   chunk.start_backward(by_class, call.exact, extra, [&](int j) {
                                       if (is_own) chunk_sums.add(chunk, j, by_class);
                                   });
                                   if (is_own) sums.add(chunk_sums, chunk.labels.bad);
                               });
    sums.total(call.partial + image * kStats * grid.rectangles() + rectangle, grid.rectangles());
}

}  // namespace ial::gpu
