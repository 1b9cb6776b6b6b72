// The launches of reduce and its backward for coarse logits: choose a chunk and a grid.
#pragma once

#include "one_pass_launch.h"
#include "upsample.cuh"

namespace ial::gpu {

// A call for coarse logits.
template <typename T>
struct UpsampledCall {
    using A = typename Arithmetic<T>::A;

    Arguments<T> arguments;
    UpsampledProblem<T> problem;

    UpsampledCall(const Inputs& inputs, const Tensor& grad)
        : arguments(inputs), problem{{}, arguments.inputs.upsampling(grad)} {
        arguments.fill(problem);
    }

    // The chunks of an image.
    int64_t chunks() const {
        return (problem.upsampling.y.coarse + 1) * problem.parts_y * (problem.upsampling.x.coarse + 1) *
               problem.parts_x;
    }

    // Calls launch.run<Chunk>() with the Chunk that fits the cells. 4 x 4 pixels would not fit the registers
    // in double or with label smoothing.
    template <typename Launch>
    void with_chunk(const Launch& launch) {
        if (problem.class_share > 0) return run<Chunk<T, 2, true>>(launch);
        if constexpr (!std::is_same_v<A, double>)
            if (std::max(most_pixels(problem.upsampling.y), most_pixels(problem.upsampling.x)) > 2)
                return run<Chunk<T, 4>>(launch);
        run<Chunk<T, 2>>(launch);
    }

 private:
    template <typename Chunk, typename Launch>
    void run(const Launch& launch) {
        const Upsampling& up = problem.upsampling;
        const int64_t y = most_pixels(up.y), x = most_pixels(up.x);
        const int64_t parts_y = divide_up(y, Chunk::S), parts_x = divide_up(x, Chunk::S);
        TORCH_CHECK_VALUE(parts_y <= kMaxCount / parts_x, "target has ", y, " x ", x,
                          " pixels between four logits, expected at most ", kMaxCount * Chunk::V, " on CUDA");
        problem.parts_y = parts_y;
        problem.parts_x = parts_x;
        launch.template run<Chunk>();
    }
};

template <typename T, typename Launcher>
struct ReduceUpsampled {
    const Launcher& launcher;
    UpsampledCall<T>& call;
    const Tensor& stats;

    template <typename Chunk>
    void run() const {
        launch_reduce(launcher, reduce_upsampled_kernel<Chunk>, call.problem, 0, call.chunks(), stats);
    }
};

template <typename T, typename Launcher>
struct PixelNllUpsampled {
    const Launcher& launcher;
    UpsampledCall<T>& call;
    const Tensor& map;

    template <typename Chunk>
    void run() const {
        launch_pixel_nll(launcher, pixel_nll_upsampled_kernel<Chunk>, call.problem, 0, call.chunks(), map);
    }
};

// Chooses the rectangles of cells for reduce_backward and one pass. On entry, *shared is the kernel's other
// shared memory in bytes. On return, it is all of it.
template <typename Chunk>
CellGrid choose_cells(const UpsampledProblem<typename Chunk::T>& problem, size_t* shared) {
    using A = typename Chunk::A;
    constexpr int64_t kMaxLanes = 8;  // leaves four cells in a warp
    *shared += problem.classes * sizeof(BackwardClass<A>) + Chunk::V * kCellThreads * sizeof(A);
    // 1024 classes in double leave less than one class's sums of the 48 KiB: the launch then requests more.
    constexpr size_t each = CornerSums<A>::bytes(1);
    const int64_t most = (std::max(kSharedBytes, *shared + each) - *shared) / each;
    CellGrid grid{};
    grid.pass_classes = divide_up(problem.classes, divide_up(problem.classes, most));
    grid.lanes = divide_up(problem.parts_x, divide_up(problem.parts_x, kMaxLanes));
    grid.rows = divide_up(problem.upsampling.y.coarse, kCellRows - 1);
    grid.columns = divide_up(problem.upsampling.x.coarse, grid.cells() - 1);
    *shared += CornerSums<A>::bytes(grid.pass_classes);
    TORCH_CHECK_VALUE(problem.upsampling.batch * grid.rows * grid.columns <= kMaxCount, "logits has ",
                      problem.upsampling.batch, " images of ", problem.upsampling.y.coarse, " x ",
                      problem.upsampling.x.coarse,
                      " pixels, too many for one launch on CUDA, expected fewer at a time");
    return grid;
}

template <typename T, typename Launcher>
struct ReduceBackwardUpsampled {
    using A = typename Arithmetic<T>::A;

    const Launcher& launcher;
    UpsampledCall<T>& call;
    const double* grad_stats;
    Incoming<A> incoming;
    bool exact;
    const Tensor& grad;

    template <typename Chunk>
    void run() const {
        const UpsampledProblem<T>& problem = call.problem;
        size_t shared = 0;
        const CellGrid grid = choose_cells<Chunk>(problem, &shared);
        launcher(reduce_backward_upsampled_kernel<Chunk>, dim3(problem.upsampling.batch * grid.rectangles()),
                 kCellThreads, shared, problem, grid, grad_stats, incoming, exact,
                 static_cast<T*>(grad.mutable_data_ptr()));
    }
};

template <typename T, typename Launcher>
struct OnePassUpsampled {
    using A = typename Arithmetic<T>::A;

    const Launcher& launcher;
    UpsampledCall<T>& call;
    const OnePassArguments<T>& arguments;

    template <typename Chunk>
    void run() const {
        const UpsampledProblem<T>& problem = call.problem;
        size_t shared = OneLevelSums<A, kCellThreads>::kBytes;
        const CellGrid grid = choose_cells<Chunk>(problem, &shared);
        arguments.run(launcher, grid.rectangles(), [&](const OnePass<T>& pass) {
            launcher(one_pass_upsampled_kernel<Chunk>, dim3(problem.upsampling.batch * grid.rectangles()),
                     kCellThreads, shared, problem, grid, pass);
        });
    }
};

}  // namespace ial::gpu
