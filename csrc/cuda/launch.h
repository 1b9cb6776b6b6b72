// The launches of the kernels of cuda/kernels.cuh and cuda/upsample.cuh: for tensors that were checked, a
// tile and a grid chosen.
//
// A Launcher is what runs a kernel: a CUDA stream (cuda/operators.cu), or the tests' CPU. It is made from a
// tensor of the device to be used and has
//   multiprocessors(), l2_bytes()   of that device
//   shared_bytes()                  that a block can have there
//   cooperative()                   whether all blocks of a launch can wait for each other
//   resident(kernel, shared)        how many blocks of kThreads run on one multiprocessor at a time
//   operator()(kernel, grid, threads, shared, arguments...), cooperate(the same)
// Nothing here waits for the device or copies from pageable memory, so it can all be captured in a graph.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

#include "../inputs.h"
#include "upsample.cuh"

namespace ial {
namespace gpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The shared memory that a block has without asking for more.
constexpr size_t kSharedBytes = 48 << 10;

// Of that, what the slabs of channels-last logits may take.
constexpr size_t kSlabBytes = kSharedBytes / 2;

// Classes that a tile of 16 bytes a row keeps in registers; more go in tiles of half the width.
constexpr int kWideClasses = 24;

// Levels up to which the fused kernel leaves room for logits beside its sums.
constexpr int kMostFusedLevels = 8;

// What a kernel counts in 32 bits: blocks of a grid, one for each sum of an image and level, and chunks of a
// cell. It leaves room for the next step.
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

// Whether each image is one piece of memory, pixel after pixel.
inline bool is_channels_last(const Layout& layout, const View& view) {
    return layout.outer_rank == 0 && view.channel == 1 && view.pixel == layout.classes;
}

inline bool aligned(const void* address, size_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// Whether each run of `lanes` pixels lies side by side, at a multiple of `lanes` elements from the start.
inline bool in_vectors(const Layout& layout, const View& view, int64_t lanes) {
    bool fits =
        view.pixel == 1 && layout.row % lanes == 0 && view.batch % lanes == 0 && view.channel % lanes == 0;
    for (int d = 0; d < layout.outer_rank; ++d) fits = fits && view.outer[d] % lanes == 0;
    return fits;
}

// The tensors of a call behind plain pointers, for logits of type T of the kernels.
template <typename T>
struct Arguments {
    using A = typename Arithmetic<T>::A;

    OptionalTensor weight, pixel_weight;
    Inputs inputs;  // with these weights

    explicit Arguments(const Inputs& given)
        : inputs{given.logits,       given.target,       weight,         pixel_weight,
                 given.class_levels, given.ignore_index, given.gradient, given.align_corners} {
        constexpr at::ScalarType arithmetic = c10::CppTypeToScalarType<A>::value;
        if (given.weight) weight = given.weight->to(arithmetic).contiguous();
        if (given.pixel_weight) pixel_weight = given.pixel_weight->to(arithmetic);
    }

    void fill(Operands<T>& operands) const {
        operands.logits = static_cast<const T*>(inputs.logits.const_data_ptr());
        operands.target = inputs.target.const_data_ptr();
        operands.weight = weight ? weight->template const_data_ptr<A>() : nullptr;
        operands.pixel_weight = pixel_weight ? pixel_weight->template const_data_ptr<A>() : nullptr;
        operands.ignore_index = inputs.ignore_index;
        operands.label = inputs.label();
        operands.classes = static_cast<int>(inputs.logits.size(1));
        operands.levels = inputs.levels();
        std::copy(inputs.class_levels.begin(), inputs.class_levels.end(), operands.class_levels);
    }
};

// How many blocks of kThreads each image gets that can keep so many threads busy: together they fill the
// device once, and none is idle.
template <typename Launcher, typename Kernel>
int choose_blocks(const Launcher& launcher, Kernel kernel, size_t shared, int64_t images, int64_t threads) {
    const int64_t resident = int64_t(launcher.multiprocessors()) * launcher.resident(kernel, shared);
    return static_cast<int>(
        std::clamp<int64_t>(divide_up(resident, images), 1, divide_up(threads, kThreads)));
}

// A call for logits of the target's size.
template <typename T>
struct Call {
    using A = typename Arithmetic<T>::A;
    static constexpr int kLanes = 16 / sizeof(T);

    Arguments<T> arguments;
    Problem<T> problem{};
    bool vectors;

    Call(const Inputs& inputs, const Tensor& grad) : arguments(inputs) {
        arguments.fill(problem);
        const Layout layout = arguments.inputs.layout(grad);
        problem.layout = layout;
        // of double a vector would hold two pixels: not worth kernels of its own
        vectors = kLanes > 2 && in_vectors(layout, layout.logits, kLanes) &&
                  in_vectors(layout, layout.grad, kLanes) && aligned(problem.logits, 16) &&
                  aligned(grad.const_data_ptr(), 16);
        problem.staged = !vectors && is_channels_last(layout, layout.logits) &&
                         is_channels_last(layout, layout.grad) && slab_bytes<T>(layout.classes) <= kSlabBytes;
        const int64_t lanes = !vectors ? 1 : layout.classes <= kWideClasses ? kLanes : kLanes / 2;
        problem.dense_labels =
            in_vectors(layout, layout.target, lanes) &&
            aligned(problem.target, std::min<size_t>(16, lanes * inputs.target.itemsize()));
    }

    size_t slabs() const { return problem.staged ? slab_bytes<T>(problem.layout.classes) : 0; }

    // Of an image, with a tile each.
    template <typename Tile>
    int64_t threads() const {
        return divide_up(problem.layout.pixels, Tile::V);
    }

    // Runs `launch` with the Tile that fits the number of classes and the layout: exactly for 11 and 19, the
    // common ones.
    template <typename Launch>
    void with_tile(const Launch& launch) const {
        if (vectors)
            with_vectors(launch);
        else
            launch.template run<Tile<T, 1, kMostClasses>>();
    }

    template <typename Launch>
    void with_vectors(const Launch& launch) const {
        if constexpr (kLanes > 2) {
            const int64_t classes = problem.layout.classes;
            if (classes <= 11)
                launch.template run<Tile<T, kLanes, 11>>();
            else if (classes <= 19)
                launch.template run<Tile<T, kLanes, 19>>();
            else if (classes <= kWideClasses)
                launch.template run<Tile<T, kLanes, kWideClasses>>();
            else
                launch.template run<Tile<T, kLanes / 2, kMostClasses>>();
        }
    }
};

// reduce_kernel, or another of its kind, and what adds up the blocks' sums. `slabs`: bytes of shared memory
// that it takes besides.
template <typename Launcher, typename Problem>
void launch_reduce(const Launcher& launcher, void (*kernel)(Problem, int, double*), Problem& problem,
                   size_t slabs, int64_t threads, const Tensor& stats) {
    using A = typename Problem::A;
    const size_t table = slabs + problem.classes * sizeof(ReduceClass<A>);
    const size_t level = Columns<A, kThreads>::bytes(1);
    const int block_levels = std::min<int>(problem.levels, (kSharedBytes - table) / level);
    const int groups = divide_up(problem.levels, block_levels);
    const size_t shared = table + block_levels * level;
    const int64_t images = stats.size(0), sums = stats.numel();
    problem.blocks = choose_blocks(launcher, kernel, shared, images, threads);

    const Tensor partial = at::empty({sums * problem.blocks}, stats.options());
    double* const rows = partial.template mutable_data_ptr<double>();
    launcher(kernel, dim3(images * problem.blocks, groups), kThreads, shared, problem, block_levels, rows);
    launcher(sum_kernel, dim3(sums), kWarp, 0, rows, problem.blocks,
             stats.template mutable_data_ptr<double>());
}

template <typename T, typename Launcher>
struct Reduce {
    const Launcher& launcher;
    Call<T>& call;
    const Tensor& stats;

    template <typename Tile>
    void run() const {
        launch_reduce(launcher, reduce_kernel<Tile>, call.problem, call.slabs(),
                      call.template threads<Tile>(), stats);
    }
};

template <typename T, typename Launcher>
struct Gradient {
    using A = typename Arithmetic<T>::A;

    const Launcher& launcher;
    Call<T>& call;
    const Tensor& table;
    const A* grad_loss;
    bool exact;
    const Tensor& grad;

    template <typename Tile>
    void run() const {
        Problem<T>& problem = call.problem;
        const size_t shared = call.slabs() + problem.layout.classes * sizeof(GradientClass<A>);
        const auto kernel = gradient_kernel<Tile>;
        problem.blocks =
            choose_blocks(launcher, kernel, shared, problem.layout.batch, call.template threads<Tile>());
        launcher(kernel, dim3(problem.layout.batch * problem.blocks), kThreads, shared, problem,
                 table.const_data_ptr<double>(), grad_loss, exact, static_cast<T*>(grad.mutable_data_ptr()));
    }
};

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

    // Runs `launch` with the Chunk that fits the cells. 4 x 4 pixels of double would not fit the registers.
    template <typename Launch>
    void with_chunk(const Launch& launch) {
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
        UpsampledProblem<T>& problem = call.problem;
        const int64_t chunks = (problem.upsampling.y.coarse + 1) * problem.parts_y *
                               (problem.upsampling.x.coarse + 1) * problem.parts_x;
        launch_reduce(launcher, reduce_upsampled_kernel<Chunk>, problem, 0, chunks, stats);
    }
};

template <typename T, typename Launcher>
struct GradientUpsampled {
    const Launcher& launcher;
    UpsampledCall<T>& call;
    const Tensor& table;
    bool exact;
    const Tensor& grad;

    template <typename Chunk>
    void run() const {
        using A = typename Chunk::A;
        constexpr int64_t kMostLanes = 8;  // leaves a row of a tile four cells
        const UpsampledProblem<T>& problem = call.problem;
        const size_t besides =
            problem.classes * sizeof(GradientClass<A>) + Chunk::V * kTileThreads * sizeof(A);
        const int most = (kSharedBytes - besides) / CornerSums<A>::bytes(1);
        Tiles tiles{};
        tiles.turn = divide_up(problem.classes, divide_up(problem.classes, most));
        tiles.lanes = divide_up(problem.parts_x, divide_up(problem.parts_x, kMostLanes));
        tiles.rows = divide_up(problem.upsampling.y.coarse, kTileRows - 1);
        tiles.columns = divide_up(problem.upsampling.x.coarse, tiles.cells() - 1);
        const int64_t blocks = problem.upsampling.batch * tiles.rows * tiles.columns;
        TORCH_CHECK_VALUE(blocks <= kMaxCount, "logits has ", problem.upsampling.batch, " images of ",
                          problem.upsampling.y.coarse, " x ", problem.upsampling.x.coarse,
                          " pixels, too many for one launch on CUDA, expected fewer at a time");
        launcher(gradient_upsampled_kernel<Chunk>, dim3(blocks), kTileThreads,
                 besides + CornerSums<A>::bytes(tiles.turn), problem, tiles, table.const_data_ptr<double>(),
                 exact, static_cast<T*>(grad.mutable_data_ptr()));
    }
};

// Where logits may stay from their first to their second use. Registers stand in for what shared memory holds
// besides.
template <typename Launcher>
int64_t on_chip_bytes(const Launcher& launcher) {
    return int64_t(launcher.multiprocessors()) * launcher.shared_bytes() + launcher.l2_bytes();
}

// The shared memory without which the fused kernel does not start, for the tile with the most threads.
inline size_t least_fused_bytes(int64_t classes, int levels, int64_t pooled_images) {
    return FusedShared<Tile<float, 4, 11>>(classes, levels, pooled_images, 0).end;
}

// The arguments that combine and table share on the device.
struct Global {
    Combine combine;
    Lambdas lambdas{};
    size_t shared;
    bool fits;

    Global(const Combine& c) : combine(c) {
        check_limits(c.batch, 0, c.levels);
        std::copy_n(c.lambdas, c.levels - 1, lambdas.value);
        shared = c.batch * c.levels * kStats * sizeof(double);
        fits = shared <= kSharedBytes;
        if (!fits) shared = 0;
    }
};

// What combine leaves: f (N or 1, g - 1), a loss for each image, and the loss, () or (N,).
struct Results {
    Tensor f, image_losses, loss;

    Results(const Combine& c, const at::TensorOptions& doubles, at::ScalarType dtype)
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

template <typename T, typename Launcher>
struct FusedLaunch {
    using A = typename Arithmetic<T>::A;

    const Launcher& launcher;
    Call<T>& call;
    const Global& global;
    bool exact;
    const Tensor &stats, &table, &grad;
    const Results& results;

    template <typename Tile>
    void run() const {
        constexpr int threads = kFusedThreads<Tile>;
        Problem<T>& problem = call.problem;
        const Layout& layout = problem.layout;
        const int64_t span = int64_t(threads) * Tile::V, useful = divide_up(layout.pixels, span);
        const int64_t wave = images_of_a_wave(threads);
        problem.blocks = static_cast<int>(std::clamp<int64_t>(launcher.multiprocessors() / wave, 1, useful));
        const FusedShared<Tile> least(layout.classes, problem.levels, wave, 0);
        const FusedShared<Tile> with_one(layout.classes, problem.levels, wave, 1);
        const size_t room = launcher.shared_bytes(), slot = with_one.end - least.end;
        const int64_t rounds = divide_up(layout.pixels, problem.blocks * span);

        Fused<T> fused{};
        fused.kept = std::min<int64_t>((room - least.end) / slot, rounds - 1);
        fused.combine = global.combine;
        fused.stats = stats.template mutable_data_ptr<double>();
        fused.table = table.template mutable_data_ptr<double>();
        fused.results = results.template pointers<A>();
        fused.wave = wave;
        fused.exact = exact;
        fused.grad = static_cast<T*>(grad.mutable_data_ptr());
        const int64_t grid = wave * problem.blocks;
        const Tensor partial = at::empty({2 * grid * problem.levels * kStats}, stats.options());
        fused.partial = partial.template mutable_data_ptr<double>();
        Tensor weight;
        if (wave < layout.batch && fused.combine.reduction == Reduction::kMean) {
            constexpr int kBlocks = 8;  // of a multiprocessor: enough threads for its memory to be busy
            fused.weights = static_cast<int>(
                std::min<int64_t>(launcher.multiprocessors() * kBlocks,
                                  divide_up(layout.batch * (layout.pixels / Tile::V), kThreads)));
            weight = at::empty({fused.weights}, stats.options());
            double* const weights = weight.template mutable_data_ptr<double>();
            fused.weight = weights;
            launcher(weigh_kernel<T, Tile::V>, dim3(fused.weights), kThreads,
                     kThreads / kWarp * sizeof(double), problem, weights);
        }
        const FusedShared<Tile> shared(layout.classes, problem.levels, wave, fused.kept);
        launcher.cooperate(fused_kernel<Tile>, dim3(grid), threads, shared.end, problem, fused,
                           global.lambdas);
    }

    // All that are pooled; else as many as leave the waves equal and the logits on the chip, in shared
    // memory, registers and L2, from their first to their second use.
    int64_t images_of_a_wave(int threads) const {
        const int64_t batch = call.problem.layout.batch;
        if (global.combine.pool_batch) return batch;
        const int64_t bytes = grad.numel() * static_cast<int64_t>(sizeof(T));
        const int64_t waves = std::clamp<int64_t>(divide_up(bytes, on_chip_bytes(launcher)), 1, batch);
        // their rows of stats and table take the place of a level's columns
        const int64_t most = std::min<int64_t>(launcher.multiprocessors(), threads * sizeof(A) / 16);
        return std::min(divide_up(batch, waves), most);
    }
};

// The launches for logits of type T of the kernels. Defined apart from the class, so that each type's kernels
// can be compiled in a file of their own.
template <typename T, typename Launcher>
struct Kernels {
    using A = typename Arithmetic<T>::A;

    static void reduce(const Launcher& launcher, const Inputs& inputs, const Tensor& stats);

    // Where grad_loss is given, table and grad are those for 1.
    static void gradient(const Launcher& launcher, const Inputs& inputs, const Tensor& table,
                         const OptionalTensor& grad_loss, bool exact, const Tensor& grad);

    // Writes stats, table, grad and the results.
    static void fused(const Launcher& launcher, const Inputs& inputs, const Global& global, bool exact,
                      const Tensor& stats, const Tensor& table, const Tensor& grad, const Results& results);
};

template <typename T, typename Launcher>
void Kernels<T, Launcher>::reduce(const Launcher& launcher, const Inputs& inputs, const Tensor& stats) {
    if (inputs.align_corners) {
        UpsampledCall<T> call(inputs, inputs.logits);
        return call.with_chunk(ReduceUpsampled<T, Launcher>{launcher, call, stats});
    }
    Call<T> call(inputs, inputs.logits);
    call.with_tile(Reduce<T, Launcher>{launcher, call, stats});
}

template <typename T, typename Launcher>
void Kernels<T, Launcher>::gradient(const Launcher& launcher, const Inputs& inputs, const Tensor& table,
                                    const OptionalTensor& grad_loss, bool exact, const Tensor& grad) {
    if (inputs.align_corners) {
        UpsampledCall<T> call(inputs, grad);
        return call.with_chunk(GradientUpsampled<T, Launcher>{launcher, call, table, exact, grad});
    }
    Tensor incoming;
    if (grad_loss) incoming = grad_loss->to(c10::CppTypeToScalarType<A>::value).contiguous();
    Call<T> call(inputs, grad);
    call.with_tile(Gradient<T, Launcher>{
        launcher, call, table, grad_loss ? incoming.template const_data_ptr<A>() : nullptr, exact, grad});
}

template <typename T, typename Launcher>
void Kernels<T, Launcher>::fused(const Launcher& launcher, const Inputs& inputs, const Global& global,
                                 bool exact, const Tensor& stats, const Tensor& table, const Tensor& grad,
                                 const Results& results) {
    Call<T> call(inputs, grad);
    TORCH_INTERNAL_ASSERT(call.vectors);
    call.with_vectors(FusedLaunch<T, Launcher>{launcher, call, global, exact, stats, table, grad, results});
}

}  // namespace gpu
}  // namespace ial
