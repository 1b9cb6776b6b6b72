// The operators on top of the kernels of ial_kernels.cuh: outputs allocated, the kernel and its grid chosen.
//
// A Launcher is what runs a kernel: a CUDA stream (ial_cuda.cu), or the tests' CPU. It is made from a tensor
// of the device to be used and has
//   multiprocessors()            of that device
//   resident(kernel, shared)     how many blocks of kThreads run on one of them at a time
//   operator()(kernel, grid, threads, shared, arguments...)
// Nothing here waits for the device or copies from pageable memory, so it can all be captured in a graph.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
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

// Classes that a tile of 16 bytes a row keeps in registers; more go in tiles of half the width, kMostClasses
// at a time.
constexpr int kWideClasses = 24, kMostClasses = 32;

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

        vectors = in_vectors(layout, layout.logits, kLanes) && in_vectors(layout, layout.grad, kLanes) &&
                  aligned(problem.logits, 16) && aligned(grad.const_data_ptr(), 16);
        problem.staged = !vectors && is_channels_last(layout, layout.logits) &&
                         is_channels_last(layout, layout.grad) && slab_bytes<T>(layout.classes) <= kSlabBytes;
        const int64_t lanes = !vectors ? 1 : layout.classes <= kWideClasses ? kLanes : kLanes / 2;
        problem.dense_labels =
            in_vectors(layout, layout.target, lanes) &&
            aligned(problem.target, std::min<size_t>(16, lanes * inputs.target.itemsize()));
    }

    size_t slabs() const { return problem.staged ? slab_bytes<T>(problem.layout.classes) : 0; }

    // Runs `launch` with the Tile that fits the number of classes and the layout.
    template <typename Launch>
    void with_tile(const Launch& launch) const {
        const int64_t classes = problem.layout.classes;
        if (vectors && classes <= kWideClasses)
            with_room_for<4>(launch);
        else if (vectors)
            launch.template run<Tile<T, kLanes / 2, kMostClasses>>();
        else if (classes <= 8)
            launch.template run<Tile<T, 1, 8>>();
        else
            launch.template run<Tile<T, 1, kMostClasses>>();
    }

    template <int B, typename Launch>
    void with_room_for(const Launch& launch) const {
        if constexpr (B < kWideClasses)
            if (problem.layout.classes > B) return with_room_for<B + 4>(launch);
        launch.template run<Tile<T, kLanes, B>>();
    }

    // How many blocks an image gets: together they fill the device once, and none is idle.
    template <typename Tile, typename Launcher, typename Kernel>
    void choose_blocks(const Launcher& launcher, Kernel kernel, size_t shared) {
        const int64_t images = problem.layout.batch, span = int64_t(kThreads) * Tile::V;
        const int64_t resident = int64_t(launcher.multiprocessors()) * launcher.resident(kernel, shared);
        const int64_t useful = (problem.layout.pixels + span - 1) / span;
        problem.blocks = static_cast<int>(std::clamp<int64_t>((resident + images - 1) / images, 1, useful));
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
        const size_t table = call.slabs() + reduce_shared_bytes<A>(classes, 0);
        const size_t level = reduce_shared_bytes<A>(0, 1);
        const int block_levels = std::min<int>(problem.levels, (kSharedBytes - table) / level);
        const int groups = (problem.levels + block_levels - 1) / block_levels;
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
    const Launcher& launcher;
    Call<T>& call;
    const Tensor& table;
    bool exact;
    const Tensor& grad;

    template <typename Tile>
    void run() const {
        Problem<T>& problem = call.problem;
        const size_t shared = call.slabs() + gradient_shared_bytes<typename Tile::A>(problem.layout.classes);
        const auto kernel = gradient_kernel<Tile>;
        call.template choose_blocks<Tile>(launcher, kernel, shared);
        launcher(kernel, dim3(problem.layout.batch * problem.blocks), kThreads, shared, problem,
                 table.const_data_ptr<double>(), exact, static_cast<T*>(grad.mutable_data_ptr()));
    }
};

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

    static void gradient_into(const Inputs& inputs, const Tensor& table, std::string_view gradient,
                              const Tensor& grad) {
        inputs.check();
        inputs.check_table(table);
        check_limits(inputs.logits.size(1), inputs.levels());
        const bool exact = is_exact(gradient);
        const Launcher launcher(grad);
        if (grad.numel() == 0) return;
        AT_DISPATCH_FLOATING_TYPES_AND2(
            at::kHalf, at::kBFloat16, grad.scalar_type(), "ial_cuda::gradient", [&] {
                using T = typename Native<scalar_t>::type;
                Call<T> call(inputs, grad);
                call.with_tile(Gradient<T, Launcher>{launcher, call, table, exact, grad});
            });
    }

    static Tensor gradient(const Tensor& logits, const Tensor& table, const Tensor& target,
                           const OptionalTensor& weight, const OptionalTensor& pixel_weight,
                           at::IntArrayRef class_levels, int64_t ignore_index, std::string_view gradient) {
        Tensor grad = at::empty_like(logits);
        gradient_into({logits, target, weight, pixel_weight, class_levels, ignore_index}, table, gradient,
                      grad);
        return grad;
    }

    static void gradient_(const Tensor& logits, const Tensor& table, const Tensor& target,
                          const OptionalTensor& weight, const OptionalTensor& pixel_weight,
                          at::IntArrayRef class_levels, int64_t ignore_index, std::string_view gradient) {
        at::assert_no_internal_overlap(logits);
        gradient_into({logits, target, weight, pixel_weight, class_levels, ignore_index}, table, gradient,
                      logits);
    }

    static std::tuple<Tensor, Tensor> combine(const Tensor& stats, at::ArrayRef<double> lambdas, double alpha,
                                              std::string_view reduction,
                                              std::string_view factor_normalization,
                                              std::string_view factor_scope, at::ScalarType dtype) {
        const Global global(
            make_combine(stats, lambdas, alpha, reduction, factor_normalization, factor_scope));
        const Combine& c = global.combine;
        const Launcher launcher(stats);
        const bool none = c.reduction == Reduction::kNone;
        Tensor f = at::empty({c.pool_batch ? 1 : c.batch, c.levels - 1}, stats.options());
        const Tensor image_losses = at::empty({c.batch}, stats.options());
        Tensor loss = none ? at::empty({c.batch}, stats.options().dtype(dtype))
                           : at::empty({}, stats.options().dtype(dtype));
        AT_DISPATCH_FLOATING_TYPES(dtype, "ial_cuda::combine", [&] {
            launcher(combine_kernel<scalar_t>, dim3(1), kThreads, global.shared, c, global.lambdas,
                     global.fits, f.mutable_data_ptr<double>(), image_losses.mutable_data_ptr<double>(),
                     loss.mutable_data_ptr<scalar_t>());
        });
        return {loss, f};
    }

    static Tensor table(const Tensor& stats, const Tensor& grad_loss, at::ArrayRef<double> lambdas,
                        double alpha, std::string_view reduction, std::string_view factor_normalization,
                        std::string_view factor_scope) {
        const Global global(
            make_combine(stats, lambdas, alpha, reduction, factor_normalization, factor_scope));
        const Combine& c = global.combine;
        const int64_t values = c.reduction == Reduction::kNone ? c.batch : 1;
        TORCH_CHECK_VALUE(grad_loss.numel() == values, "grad_loss has shape ", grad_loss.sizes(),
                          ", expected ", values, " value(s) for reduction='", reduction, "'");
        TORCH_CHECK_VALUE(grad_loss.device() == stats.device(), "grad_loss is on ", grad_loss.device(),
                          ", expected ", stats.device(), " as stats");
        const Launcher launcher(stats);
        const Tensor grad = grad_loss.contiguous();
        Tensor result = at::empty_like(stats);
        AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "ial_cuda::table", [&] {
            launcher(table_kernel<scalar_t>, dim3(1), kThreads, global.shared, c, global.lambdas, global.fits,
                     grad.const_data_ptr<scalar_t>(), result.mutable_data_ptr<double>());
        });
        return result;
    }

    static void implement(torch::Library& m) {
        m.impl("reduce", reduce);
        m.impl("gradient", gradient);
        m.impl("gradient_", gradient_);
        m.impl("combine", combine);
        m.impl("table", table);
    }
};

}  // namespace gpu
}  // namespace ial
