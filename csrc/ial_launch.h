// The operators on top of the kernels of ial_kernels.cuh: outputs allocated, the kernel and its grid chosen.
//
// A Launcher is what runs a kernel: a CUDA stream (ial_cuda.cu), or the tests' CPU. It is made from a tensor
// of the device to be used and has
//   multiprocessors(), l2_bytes()   of that device
//   shared_bytes()                  that a block can have there
//   cooperative()                   whether all blocks of a launch can wait for each other
//   resident(kernel, shared)        how many blocks of kThreads run on one multiprocessor at a time
//   operator()(kernel, grid, threads, shared, arguments...), cooperate(the same)
// Nothing here waits for the device or copies from pageable memory, so it can all be captured in a graph.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>

#include "ial_kernels.cuh"
#include "ial_ops.h"

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

// Levels up to which the fused kernel has room for its sums, and the shared memory of a block that it takes them
// to be in.
constexpr int kMostFusedLevels = 8;
constexpr int kLeastFusedSharedBytes = 96 << 10;

template <typename T>
struct Native {
    using type = T;
};
template <>
struct Native<c10::Half> {
    using type = __half;
};
template <>
struct Native<c10::BFloat16> {
    using type = __nv_bfloat16;
};

inline void check_limits(int64_t classes, int levels) {
    TORCH_CHECK_VALUE(classes <= kMaxClasses, "logits has ", classes, " classes, expected at most ",
                      kMaxClasses, " on CUDA; use backend=\"reference\"");
    TORCH_CHECK_VALUE(levels <= kMaxLevels, "hierarchy has ", levels, " levels, expected at most ",
                      kMaxLevels, " on CUDA; use backend=\"reference\"");
}

// Whether each image is one piece of memory, pixel after pixel.
inline bool is_channels_last(const Layout& layout, const View& view) {
    return layout.outer_rank == 0 && view.channel == 1 && view.pixel == layout.classes;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
struct Call {
    using A = typename Arithmetic<T>::A;
    static constexpr int kLanes = 16 / sizeof(T);

    OptionalTensor weight, pixel_weight;
    Problem<T> problem{};
    bool vectors;

    Call(const Inputs& inputs, const Tensor& grad) {
        constexpr at::ScalarType arithmetic = c10::CppTypeToScalarType<A>::value;
        if (inputs.weight) weight = inputs.weight->to(arithmetic).contiguous();
        if (inputs.pixel_weight) pixel_weight = inputs.pixel_weight->to(arithmetic);

        const Inputs converted{inputs.logits, inputs.target,       weight,
                               pixel_weight,  inputs.class_levels, inputs.ignore_index};
        const Layout layout = converted.layout(grad);
        problem.layout = layout;
        problem.logits = static_cast<const T*>(inputs.logits.const_data_ptr());
        problem.target = inputs.target.const_data_ptr();
        problem.weight = weight ? weight->template const_data_ptr<A>() : nullptr;
        problem.pixel_weight = pixel_weight ? pixel_weight->template const_data_ptr<A>() : nullptr;
        problem.ignore_index = inputs.ignore_index;
        problem.label = inputs.label();
        problem.levels = inputs.levels();
        std::copy(inputs.class_levels.begin(), inputs.class_levels.end(), problem.class_levels);

        // of double a vector would hold two pixels: not worth kernels of its own
        vectors = kLanes > 2 && in_vectors(layout, layout.logits, kLanes) && in_vectors(layout, layout.grad, kLanes) &&
                  aligned(problem.logits, 16) && aligned(grad.const_data_ptr(), 16);
        problem.staged = !vectors && is_channels_last(layout, layout.logits) &&
                         is_channels_last(layout, layout.grad) && slab_bytes<T>(layout.classes) <= kSlabBytes;
        const int64_t lanes = !vectors ? 1 : layout.classes <= kWideClasses ? kLanes : kLanes / 2;
        problem.dense_labels =
            in_vectors(layout, layout.target, lanes) &&
            aligned(problem.target, std::min<size_t>(16, lanes * inputs.target.itemsize()));
    }

    size_t slabs() const { return problem.staged ? slab_bytes<T>(problem.layout.classes) : 0; }

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

    // How many blocks an image gets: together they fill the device once, and none is idle.
    template <typename Tile, typename Launcher, typename Kernel>
    void choose_blocks(const Launcher& launcher, Kernel kernel, size_t shared) {
        const int64_t images = problem.layout.batch, span = int64_t(kThreads) * Tile::V;
        const int64_t resident = int64_t(launcher.multiprocessors()) * launcher.resident(kernel, shared);
        problem.blocks = static_cast<int>(
            std::clamp<int64_t>(divide_up(resident, images), 1, divide_up(problem.layout.pixels, span)));
    }
};

template <typename T, typename Launcher>
struct Reduce {
    const Launcher& launcher;
    Call<T>& call;
    const Tensor& stats;

    template <typename Tile>
    void run() const {
        using A = typename Tile::A;
        Problem<T>& problem = call.problem;
        const int64_t classes = problem.layout.classes;
        const size_t table = call.slabs() + classes * sizeof(ReduceClass<A>);
        const size_t level = Columns<A, kThreads>::bytes(1);
        const int block_levels = std::min<int>(problem.levels, (kSharedBytes - table) / level);
        const int groups = divide_up(problem.levels, block_levels);
        const size_t shared = table + block_levels * level;
        const auto kernel = reduce_kernel<Tile>;
        call.template choose_blocks<Tile>(launcher, kernel, shared);

        const int64_t sums = stats.numel();
        const Tensor partial = at::empty({sums * problem.blocks}, stats.options());
        double* const rows = partial.template mutable_data_ptr<double>();
        launcher(kernel, dim3(problem.layout.batch * problem.blocks, groups), kThreads, shared, problem,
                 block_levels, rows);
        launcher(sum_kernel, dim3(sums), kWarp, 0, rows, problem.blocks,
                 stats.template mutable_data_ptr<double>());
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
        call.template choose_blocks<Tile>(launcher, kernel, shared);
        launcher(kernel, dim3(problem.layout.batch * problem.blocks), kThreads, shared, problem,
                 table.const_data_ptr<double>(), grad_loss, exact,
                 static_cast<T*>(grad.mutable_data_ptr()));
    }
};

// Where logits may stay from their first to their second use. Registers stand in for what shared memory holds
// besides.
template <typename Launcher>
int64_t on_chip_bytes(const Launcher& launcher) {
    return int64_t(launcher.multiprocessors()) * launcher.shared_bytes() + launcher.l2_bytes();
}

// The arguments that combine and table share on the device.
struct Global {
    Combine combine;
    Lambdas lambdas{};
    size_t shared;
    bool fits;

    Global(const Combine& c) : combine(c) {
        check_limits(0, c.levels);
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
        problem.blocks =
            static_cast<int>(std::clamp<int64_t>(launcher.multiprocessors() / wave, 1, useful));
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
            fused.weights = static_cast<int>(std::min<int64_t>(
                launcher.multiprocessors() * kBlocks,
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

    // All that are pooled; else as many as leave the waves equal and the logits on the chip, in shared memory,
    // registers and L2, from their first to their second use.
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

template <typename Launcher>
struct Operators {
    static Tensor reduce(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                         const OptionalTensor& pixel_weight, at::IntArrayRef class_levels,
                         int64_t ignore_index, std::string_view, bool) {
        const Inputs inputs{logits, target, weight, pixel_weight, class_levels, ignore_index};
        inputs.check();
        check_limits(logits.size(1), inputs.levels());
        const Launcher launcher(logits);
        const std::array<int64_t, 3> shape = {logits.size(0), inputs.levels(), kStats};
        const auto options = logits.options().dtype(at::kDouble);
        if (logits.numel() == 0) return at::zeros(shape, options);
        const Tensor stats = at::empty(shape, options);
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "ial_cuda::reduce",
                                        [&] {
                                            using T = typename Native<scalar_t>::type;
                                            Call<T> call(inputs, logits);
                                            call.with_tile(Reduce<T, Launcher>{launcher, call, stats});
                                        });
        return stats;
    }

    // Where grad_loss is given, table and grad are those for 1.
    static void gradient_into(const Inputs& inputs, const Tensor& table, const OptionalTensor& grad_loss,
                              std::string_view gradient, const Tensor& grad) {
        inputs.check();
        inputs.check_table(table);
        if (grad_loss) check_grad_loss(*grad_loss, table, 1);
        check_limits(inputs.logits.size(1), inputs.levels());
        const bool exact = is_exact(gradient);
        const Launcher launcher(grad);
        if (grad.numel() == 0) return;
        AT_DISPATCH_FLOATING_TYPES_AND2(
            at::kHalf, at::kBFloat16, grad.scalar_type(), "ial_cuda::gradient", [&] {
                using T = typename Native<scalar_t>::type;
                using A = typename Arithmetic<T>::A;
                Tensor incoming;
                if (grad_loss)
                    incoming = grad_loss->to(c10::CppTypeToScalarType<A>::value).contiguous();
                Call<T> call(inputs, grad);
                call.with_tile(Gradient<T, Launcher>{
                    launcher, call, table, grad_loss ? incoming.const_data_ptr<A>() : nullptr, exact,
                    grad});
            });
    }

    static Tensor gradient(const Tensor& logits, const Tensor& table, const Tensor& target,
                           const OptionalTensor& weight, const OptionalTensor& pixel_weight,
                           at::IntArrayRef class_levels, int64_t ignore_index, std::string_view gradient) {
        Tensor grad = at::empty_like(logits);
        gradient_into({logits, target, weight, pixel_weight, class_levels, ignore_index}, table, {}, gradient,
                      grad);
        return grad;
    }

    static void gradient_(const Tensor& logits, const Tensor& table, const Tensor& target,
                          const OptionalTensor& weight, const OptionalTensor& pixel_weight,
                          at::IntArrayRef class_levels, int64_t ignore_index, std::string_view gradient) {
        at::assert_no_internal_overlap(logits);
        gradient_into({logits, target, weight, pixel_weight, class_levels, ignore_index}, table, {}, gradient,
                      logits);
    }

    static void rescale_(const Tensor& grad, const Tensor& grad_loss, const Tensor& logits,
                         const Tensor& table, const Tensor& target, const OptionalTensor& weight,
                         const OptionalTensor& pixel_weight, at::IntArrayRef class_levels,
                         int64_t ignore_index, std::string_view gradient) {
        gradient_into({logits, target, weight, pixel_weight, class_levels, ignore_index}, table, grad_loss,
                      gradient, grad);
    }

    static std::tuple<Tensor, Tensor> combine(const Tensor& stats, at::ArrayRef<double> lambdas, double alpha,
                                              std::string_view reduction,
                                              std::string_view factor_normalization,
                                              std::string_view factor_scope, at::ScalarType dtype) {
        const Global global(
            make_combine(stats, lambdas, alpha, reduction, factor_normalization, factor_scope));
        const Combine& c = global.combine;
        const Launcher launcher(stats);
        const Results results(c, stats.options(), dtype);
        AT_DISPATCH_FLOATING_TYPES(dtype, "ial_cuda::combine", [&] {
            launcher(combine_kernel<scalar_t>, dim3(1), kThreads, global.shared, c, global.lambdas,
                     global.fits, results.pointers<scalar_t>());
        });
        return {results.loss, results.f};
    }

    static Tensor table(const Tensor& stats, const Tensor& grad_loss, at::ArrayRef<double> lambdas,
                        double alpha, std::string_view reduction, std::string_view factor_normalization,
                        std::string_view factor_scope) {
        const Global global(
            make_combine(stats, lambdas, alpha, reduction, factor_normalization, factor_scope));
        const Combine& c = global.combine;
        check_grad_loss(grad_loss, stats, c.reduction == Reduction::kNone ? c.batch : 1);
        const Launcher launcher(stats);
        const Tensor grad = grad_loss.contiguous();
        Tensor result = at::empty_like(stats);
        AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "ial_cuda::table", [&] {
            launcher(table_kernel<scalar_t>, dim3(1), kThreads, global.shared, c, global.lambdas, global.fits,
                     grad.const_data_ptr<scalar_t>(), result.mutable_data_ptr<double>());
        });
        return result;
    }

    static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused(
        const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
        const OptionalTensor& pixel_weight, at::IntArrayRef class_levels, int64_t ignore_index,
        std::string_view gradient, at::ArrayRef<double> lambdas, double alpha, std::string_view reduction,
        std::string_view factor_normalization, std::string_view factor_scope) {
        const Inputs inputs{logits, target, weight, pixel_weight, class_levels, ignore_index};
        inputs.check();
        check_limits(logits.size(1), inputs.levels());
        const Launcher launcher(logits);
        TORCH_CHECK_VALUE(reduction != "none", "reduction is 'none', expected 'mean' or 'sum'");
        const bool exact = is_exact(gradient);
        const at::ScalarType dtype = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
        if (!has_one_launch(launcher, logits, inputs.levels(), factor_scope)) {
            const Tensor stats = reduce(logits, target, weight, pixel_weight, class_levels, ignore_index,
                                        gradient, false);
            const auto [loss, f] =
                combine(stats, lambdas, alpha, reduction, factor_normalization, factor_scope, dtype);
            const Tensor rows = table(stats, at::ones_like(loss), lambdas, alpha, reduction,
                                      factor_normalization, factor_scope);
            const Tensor grad = Operators::gradient(logits, rows, target, weight, pixel_weight, class_levels,
                                                    ignore_index, gradient);
            return {loss, f, stats, rows, grad};
        }
        const Tensor stats =
            at::empty({logits.size(0), inputs.levels(), kStats}, logits.options().dtype(at::kDouble));
        const Tensor rows = at::empty_like(stats), grad = at::empty_like(logits);
        const Global global(
            make_combine(stats, lambdas, alpha, reduction, factor_normalization, factor_scope));
        const Results results(global.combine, stats.options(), dtype);
        const auto one_launch = [&](auto type) {
            using T = decltype(type);
            Call<T> call(inputs, grad);
            call.with_vectors(
                FusedLaunch<T, Launcher>{launcher, call, global, exact, stats, rows, grad, results});
        };
        if (logits.scalar_type() == at::kFloat)
            one_launch(float());
        else if (logits.scalar_type() == at::kHalf)
            one_launch(__half());
        else
            one_launch(__nv_bfloat16());
        return {results.loss, results.f, stats, rows, grad};
    }

    // Whether one launch can do it: each thread reads and writes vectors, all blocks are there at a time, and
    // there is room for their sums.
    static bool has_one_launch(const Launcher& launcher, const Tensor& logits, int64_t levels,
                               std::string_view factor_scope) {
        return logits.scalar_type() != at::kDouble && logits.numel() > 0 && logits.is_contiguous() &&
               logits.numel() / (logits.size(0) * logits.size(1)) * logits.itemsize() % 16 == 0 &&
               aligned(logits.const_data_ptr(), 16) && logits.size(1) <= kMostClasses &&
               levels <= kMostFusedLevels && launcher.cooperative() &&
               launcher.shared_bytes() >= kLeastFusedSharedBytes &&
               (!is_pooled(factor_scope) || logits.size(0) <= launcher.multiprocessors());
    }

    // Whether it will be faster than several: an image, or all that are pooled, stay on the chip.
    static bool fuses(const Tensor& logits, int64_t levels, std::string_view factor_scope) {
        const Launcher launcher(logits);
        return has_one_launch(launcher, logits, levels, factor_scope) &&
               static_cast<int64_t>(logits.nbytes()) / (is_pooled(factor_scope) ? 1 : logits.size(0)) <=
                   on_chip_bytes(launcher);
    }

    static void implement(torch::Library& m) {
        m.impl("reduce", reduce);
        m.impl("gradient", gradient);
        m.impl("gradient_", gradient_);
        m.impl("combine", combine);
        m.impl("table", table);
        m.impl("fused", fused);
        m.impl("rescale_", rescale_);
        m.impl("fuses", fuses);
    }
};

}  // namespace gpu
}  // namespace ial
