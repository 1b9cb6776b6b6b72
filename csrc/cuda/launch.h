// The launches of reduce and its backward for full-size logits: choose a tile and a grid.
// Also what all launches share: limits, the operands of a call, the arguments of combine.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>

#include "../inputs.h"
#include "backward.cuh"
#include "combine.cuh"
#include "pixel_nll.cuh"

// A Launcher runs kernels: on a CUDA stream (cuda/stream.h), or in the emulator of the tests. It is
// constructed from a tensor on its device and has
//   multiprocessors(), l2_bytes()   of the device
//   shared_bytes()                  that a block can request
//   cooperative()                   whether the blocks of a launch can wait for each other
//   resident(kernel, shared)        how many blocks of kThreads run on one multiprocessor at a time
//   operator()(kernel, grid, threads, shared, arguments...), and cooperate() with the same parameters
// No launch waits for the device or copies from pageable memory, so CUDA graphs can capture every launch.
namespace ial::gpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The part of the shared memory for channels-last logits.
constexpr size_t kStagingBytes = kSharedBytes / 2;

// The largest number of classes for which a tile of float has rows of 16 bytes. With more classes, and always
// in half precision, rows have 8 bytes.
constexpr int kWideClasses = 24;

// The largest count that kernels hold in 32 bits: of blocks in a grid, with one block per sum of an image and
// level, and of chunks in a cell. The margin is for the next step of a loop.
constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max() - kThreads;

inline void check_limits(int64_t images, int64_t classes, int levels) {
    TORCH_CHECK_VALUE(classes <= kMaxClasses, "logits has ", classes, " classes, expected at most ",
                      kMaxClasses, " on CUDA; use backend=\"reference\"");
    TORCH_CHECK_VALUE(levels <= kMaxLevels, "hierarchy has ", levels, " levels, expected at most ",
                      kMaxLevels, " on CUDA; use backend=\"reference\"");
    const int64_t most = kMaxCount / (levels * kStats);
    TORCH_CHECK_VALUE(images <= most, "logits has ", images, " images, expected at most ", most, " with ",
                      levels, " levels on CUDA");
}

// Whether each image is contiguous in memory, pixel after pixel.
inline bool is_channels_last(const Layout& layout, const View& view) {
    return layout.outer_rank == 0 && view.channel == 1 && view.pixel == layout.classes;
}

inline bool aligned(const void* address, size_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// Whether the pixels can be split into vectors of `lanes` adjacent pixels, each at an offset that is a
// multiple of `lanes`.
inline bool in_vectors(const Layout& layout, const View& view, int64_t lanes) {
    bool fits =
        view.pixel == 1 && layout.row % lanes == 0 && view.batch % lanes == 0 && view.channel % lanes == 0;
    for (int d = 0; d < layout.outer_rank; ++d) fits = fits && view.outer[d] % lanes == 0;
    return fits;
}

// Whether the labels of `lanes` adjacent pixels are always one aligned vector.
inline bool has_dense_labels(const Layout& layout, const void* target, int64_t itemsize, int64_t lanes) {
    return in_vectors(layout, layout.target, lanes) &&
           aligned(target, std::min<size_t>(16, lanes * itemsize));
}

// The tensors of a call, as operands for kernels with logits of type T. It cannot be copied, because `inputs`
// refers to the other members.
template <typename T>
struct Arguments {
    using A = typename Arithmetic<T>::A;

    OptionalTensor weight, pixel_weight;
    Inputs inputs;  // with these weights

    explicit Arguments(const Inputs& given)
        : inputs{given.logits,   given.target,          weight,
                 pixel_weight,   given.class_levels,    given.ignore_index,
                 given.gradient, given.label_smoothing, given.align_corners} {
        constexpr at::ScalarType arithmetic = c10::CppTypeToScalarType<A>::value;
        if (given.weight) weight = given.weight->to(arithmetic).contiguous();
        if (given.pixel_weight) pixel_weight = given.pixel_weight->to(arithmetic);
    }
    Arguments(const Arguments&) = delete;
    Arguments& operator=(const Arguments&) = delete;

    void fill(Operands<T>& operands) const {
        operands.logits = static_cast<const T*>(inputs.logits.const_data_ptr());
        operands.target = inputs.target.const_data_ptr();
        operands.weight = weight ? weight->template const_data_ptr<A>() : nullptr;
        operands.pixel_weight = pixel_weight ? pixel_weight->template const_data_ptr<A>() : nullptr;
        operands.ignore_index = inputs.ignore_index;
        operands.label = inputs.label();
        operands.classes = static_cast<int>(inputs.logits.size(1));
        operands.levels = inputs.levels();
        operands.target_share = 1 - inputs.label_smoothing;
        operands.class_share = inputs.label_smoothing / operands.classes;
        std::copy(inputs.class_levels.begin(), inputs.class_levels.end(), operands.class_levels);
    }
};

// A call for full-size logits.
template <typename T>
struct Call {
    // The pixels of a tile, and of one with rows of 8 bytes. A vector of double would hold only two pixels,
    // which does not justify kernels of its own. Eight pixels of half precision would take so many registers
    // that too few warps are left to hide the latency of the loads.
    static constexpr bool kHasVectors = sizeof(T) <= 4;
    static constexpr int kLanes = 4, kNarrowLanes = 8 / sizeof(T);

    Arguments<T> arguments;
    Problem<T> problem{};
    bool vectors;

    Call(const Inputs& inputs, const Tensor& grad) : arguments(inputs) {
        arguments.fill(problem);
        const Layout layout = arguments.inputs.layout(grad);
        problem.layout = layout;
        constexpr size_t row = kLanes * sizeof(T);
        vectors = kHasVectors && in_vectors(layout, layout.logits, kLanes) &&
                  in_vectors(layout, layout.grad, kLanes) && aligned(problem.logits, row) &&
                  aligned(grad.const_data_ptr(), row);
        problem.staged = !vectors && is_channels_last(layout, layout.logits) &&
                         is_channels_last(layout, layout.grad) &&
                         staging_bytes<T>(layout.classes) <= kStagingBytes;
        const int64_t lanes = !vectors ? 1 : is_wide() ? kLanes : kNarrowLanes;
        problem.dense_labels = has_dense_labels(layout, problem.target, inputs.target.itemsize(), lanes);
    }

    bool is_smooth() const { return problem.class_share > 0; }

    // Whether a tile has kLanes pixels. With label smoothing, the same tile serves any number of classes.
    bool is_wide() const { return problem.layout.classes <= kWideClasses && !is_smooth(); }

    size_t staged_bytes() const { return problem.staged ? staging_bytes<T>(problem.layout.classes) : 0; }

    // Threads for an image, with one tile each.
    template <typename Tile>
    int64_t threads() const {
        return divide_up(problem.layout.pixels, Tile::V);
    }

    // Calls launch.run<Tile>() with the Tile that fits the number of classes and the layout. Without label
    // smoothing, the common numbers 11 and 19 have tiles of their own.
    template <typename Launch>
    void with_tile(const Launch& launch) const {
        if (vectors)
            with_vectors(launch);
        else if (is_smooth())
            launch.template run<Tile<T, 1, kRegisterClasses, true>>();
        else
            launch.template run<Tile<T, 1, kRegisterClasses>>();
    }

    template <typename Launch>
    void with_vectors(const Launch& launch) const {
        if constexpr (kHasVectors) {
            const int64_t classes = problem.layout.classes;
            if (is_smooth())
                launch.template run<Tile<T, kNarrowLanes, kRegisterClasses, true>>();
            else if (classes <= 11)
                launch.template run<Tile<T, kLanes, 11>>();
            else if (classes <= 19)
                launch.template run<Tile<T, kLanes, 19>>();
            else if (is_wide())
                launch.template run<Tile<T, kLanes, kWideClasses>>();
            else
                launch.template run<Tile<T, kNarrowLanes, kRegisterClasses>>();
        }
    }
};

// -------------------------------------------------------------------------------------------------
// reduce and its backward

// Blocks of kThreads for each image, which can keep `threads` threads busy. All blocks together run at the
// same time: a few that had to wait for the others would take as long again.
template <typename Launcher, typename Kernel>
int choose_blocks(const Launcher& launcher, Kernel kernel, size_t shared, int64_t images, int64_t threads) {
    const int64_t resident = int64_t(launcher.multiprocessors()) * launcher.resident(kernel, shared);
    return static_cast<int>(std::clamp<int64_t>(resident / images, 1, divide_up(threads, kThreads)));
}

// stats = the sum over the blocks of each row of `partial`.
template <typename Launcher>
void launch_sums(const Launcher& launcher, const Tensor& partial, int blocks, const Tensor& stats) {
    launcher(sum_kernel, dim3(stats.numel()), kWarp, 0, partial.template const_data_ptr<double>(), blocks,
             stats.template mutable_data_ptr<double>());
}

// Launches a reduce kernel, then sum_kernel. `staged_bytes` is the shared memory for staging.
template <typename Launcher, typename Problem>
void launch_reduce(const Launcher& launcher, void (*kernel)(Problem, int, double*), Problem& problem,
                   size_t staged_bytes, int64_t threads, const Tensor& stats) {
    using A = typename Problem::A;
    const size_t other_bytes = staged_bytes + problem.classes * sizeof(ReduceClass<A>);
    const size_t level = ThreadSums<A, kThreads>::bytes(1);
    const int block_levels = std::min<int>(problem.levels, (kSharedBytes - other_bytes) / level);
    const int groups = divide_up(problem.levels, block_levels);
    const size_t shared = other_bytes + block_levels * level;
    const int64_t images = stats.size(0), sums = stats.numel();
    problem.blocks = choose_blocks(launcher, kernel, shared, images, threads);

    const Tensor partial = at::empty({sums * problem.blocks}, stats.options());
    launcher(kernel, dim3(images * problem.blocks, groups), kThreads, shared, problem, block_levels,
             partial.template mutable_data_ptr<double>());
    launch_sums(launcher, partial, problem.blocks, stats);
}

template <typename T, typename Launcher>
struct Reduce {
    const Launcher& launcher;
    Call<T>& call;
    const Tensor& stats;

    template <typename Tile>
    void run() const {
        launch_reduce(launcher, reduce_kernel<Tile>, call.problem, call.staged_bytes(),
                      call.template threads<Tile>(), stats);
    }
};

template <typename T, typename Launcher>
struct ReduceBackward {
    using A = typename Arithmetic<T>::A;

    const Launcher& launcher;
    Call<T>& call;
    const double* grad_stats;
    Incoming<A> incoming;
    bool exact;
    const Tensor& grad;

    template <typename Tile>
    void run() const {
        Problem<T>& problem = call.problem;
        const size_t shared = call.staged_bytes() + problem.layout.classes * sizeof(BackwardClass<A>);
        const auto kernel = reduce_backward_kernel<Tile>;
        problem.blocks =
            choose_blocks(launcher, kernel, shared, problem.layout.batch, call.template threads<Tile>());
        launcher(kernel, dim3(problem.layout.batch * problem.blocks), kThreads, shared, problem, grad_stats,
                 incoming, exact, static_cast<T*>(grad.mutable_data_ptr()));
    }
};

// -------------------------------------------------------------------------------------------------
// pixel_nll

template <typename Launcher, typename Problem>
void launch_pixel_nll(const Launcher& launcher, void (*kernel)(Problem, typename Problem::A*),
                      Problem& problem, size_t staged_bytes, int64_t threads, const Tensor& map) {
    using A = typename Problem::A;
    const size_t shared = staged_bytes + problem.classes * sizeof(ReduceClass<A>);
    const int64_t images = map.size(0);
    problem.blocks = choose_blocks(launcher, kernel, shared, images, threads);
    launcher(kernel, dim3(images * problem.blocks), kThreads, shared, problem,
             map.template mutable_data_ptr<A>());
}

template <typename T, typename Launcher>
struct PixelNll {
    const Launcher& launcher;
    Call<T>& call;
    const Tensor& map;

    template <typename Tile>
    void run() const {
        launch_pixel_nll(launcher, pixel_nll_kernel<Tile>, call.problem, call.staged_bytes(),
                         call.template threads<Tile>(), map);
    }
};

// -------------------------------------------------------------------------------------------------
// combine and its backward

// The arguments that combine and its backward share on the device.
struct CombineArguments {
    Combine combine;
    Lambdas lambdas{};
    size_t shared;
    bool fits;  // whether the stats fit into shared memory

    explicit CombineArguments(const Combine& c) : combine(c) {
        check_limits(c.batch, 0, c.levels);
        std::copy_n(c.lambdas, c.levels - 1, lambdas.value);
        shared = c.batch * c.levels * kStats * sizeof(double);
        fits = shared <= kSharedBytes;
        if (!fits) shared = 0;
    }
};

// The results of combine: f (N or 1, g - 1), the loss of each image, and the loss, () or (N,).
struct CombineResults {
    Tensor f, image_losses, loss;

    CombineResults(const Combine& c, const at::TensorOptions& doubles, at::ScalarType dtype)
        : f(at::empty({c.pool_batch ? 1 : c.batch, c.levels - 1}, doubles)),
          image_losses(at::empty({c.batch}, doubles)),
          loss(c.reduction == Reduction::kNone ? at::empty({c.batch}, doubles.dtype(dtype))
                                               : at::empty({}, doubles.dtype(dtype))) {}

    template <typename L>
    Combined<L> pointers() const {
        return {f.mutable_data_ptr<double>(), image_losses.mutable_data_ptr<double>(),
                loss.mutable_data_ptr<L>()};
    }
};

// What loss_and_grad computes for the backward pass. grad has the layout of the logits.
struct TrainingResults {
    Tensor stats, grad_stats, grad, computed_for;

    TrainingResults(const Tensor& logits, int levels)
        : stats(at::empty({logits.size(0), levels, kStats}, logits.options().dtype(at::kDouble))),
          grad_stats(at::empty_like(stats)),
          grad(at::empty_like(logits)),
          computed_for(at::empty({}, stats.options())) {}
};

inline ComputedFor make_computed_for(const OptionalTensor& expected, const Tensor& computed_for) {
    return {expected ? expected->const_data_ptr<double>() : nullptr, computed_for.mutable_data_ptr<double>()};
}

}  // namespace ial::gpu
