// The operators for any Launcher (cuda/launch.h). They check the arguments, allocate the outputs and launch.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <string_view>

#include "kernels.h"

namespace ial::gpu {

// Maps a type of torch to the type of the kernels.
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

template <typename Launcher>
struct Operators {
    static Tensor reduce(const Tensor& logits, IAL_PIXEL_PARAMETERS, bool,
                         std::optional<bool> align_corners) {
        const Inputs inputs{logits, IAL_PIXEL_ARGUMENTS, align_corners};
        inputs.check();
        check_limits(logits.size(0), logits.size(1), inputs.levels());
        const Launcher launcher(logits);
        const std::array<int64_t, 3> shape = {logits.size(0), inputs.levels(), kStats};
        const auto options = logits.options().dtype(at::kDouble);
        if (logits.numel() == 0) return at::zeros(shape, options);
        const Tensor stats = at::empty(shape, options);
        AT_DISPATCH_FLOATING_TYPES_AND2(
            at::kHalf, at::kBFloat16, logits.scalar_type(), "ial_cuda::reduce",
            [&] { Kernels<typename Native<scalar_t>::type, Launcher>::reduce(launcher, inputs, stats); });
        return stats;
    }

    static Tensor reduce_backward(const Tensor& logits, const Tensor& grad_stats, IAL_PIXEL_PARAMETERS,
                                  std::optional<bool> align_corners) {
        Tensor grad = at::empty_like(logits);
        write_grad({logits, IAL_PIXEL_ARGUMENTS, align_corners}, &grad_stats, nullptr, grad);
        return grad;
    }

    static void reduce_backward_(const Tensor& logits, const Tensor& grad_stats, IAL_PIXEL_PARAMETERS) {
        write_grad({logits, IAL_PIXEL_ARGUMENTS}, &grad_stats, nullptr, logits);
    }

    static void rescale_(const Tensor& grad, const Tensor& grad_loss, const Tensor& computed_for,
                         const Tensor& logits, const Tensor& grad_stats, IAL_PIXEL_PARAMETERS,
                         std::optional<bool> align_corners, const OptionalTensor& expected) {
        check_grad_loss(grad_loss, grad_stats, 1);
        check_expected(expected, logits);
        TORCH_CHECK_VALUE(computed_for.numel() == 1 && computed_for.scalar_type() == at::kDouble &&
                              computed_for.device() == logits.device(),
                          "computed_for has shape ", computed_for.sizes(), " of ", computed_for.scalar_type(),
                          " on ", computed_for.device(), ", expected one value of Double on ",
                          logits.device());
        const Rescaling rescaling{grad_loss, computed_for, expected};
        write_grad({logits, IAL_PIXEL_ARGUMENTS, align_corners}, &grad_stats, &rescaling, grad);
    }

    static Tensor pixel_nll(const Tensor& logits, IAL_NLL_PARAMETERS) {
        const NllInputs nll(logits, std::nullopt, IAL_NLL_ARGUMENTS);
        check_limits(logits.size(0), logits.size(1), nll.inputs.levels());
        const Launcher launcher(logits);
        const Tensor map = nll.empty_map();
        if (map.numel() == 0) return map;
        AT_DISPATCH_FLOATING_TYPES_AND2(
            at::kHalf, at::kBFloat16, logits.scalar_type(), "ial_cuda::pixel_nll", [&] {
                Kernels<typename Native<scalar_t>::type, Launcher>::pixel_nll(launcher, nll.inputs, map);
            });
        return map;
    }

    static Tensor pixel_nll_backward(const Tensor& logits, const Tensor& grad_nll, IAL_NLL_PARAMETERS) {
        const NllInputs nll(logits, grad_nll, IAL_NLL_ARGUMENTS);
        Tensor grad = at::empty_like(logits);
        write_grad(nll.inputs, nullptr, nullptr, grad);
        return grad;
    }

    static std::tuple<Tensor, Tensor> combine(const Tensor& stats, IAL_COMBINE_PARAMETERS,
                                              at::ScalarType dtype) {
        const CombineArguments arguments(make_combine(stats, IAL_COMBINE_ARGUMENTS));
        const Combine& c = arguments.combine;
        const Launcher launcher(stats);
        const CombineResults results(c, stats.options(), dtype);
        launch_combine(launcher, arguments, results);
        return {results.loss, results.f};
    }

    static Tensor combine_backward(const Tensor& stats, const Tensor& grad_loss, IAL_COMBINE_PARAMETERS) {
        const CombineArguments arguments(make_combine(stats, IAL_COMBINE_ARGUMENTS));
        const Combine& c = arguments.combine;
        check_grad_loss(grad_loss, stats, c.reduction == Reduction::kNone ? c.batch : 1);
        const Launcher launcher(stats);
        Tensor grad_stats = at::empty_like(stats);
        if (c.batch == 0) return grad_stats;  // the kernel would write to the row of the first image
        const Tensor incoming = grad_loss.contiguous();
        AT_DISPATCH_FLOATING_TYPES(incoming.scalar_type(), "ial_cuda::combine_backward", [&] {
            launcher(combine_backward_kernel<scalar_t>, dim3(1), kThreads, arguments.shared, c,
                     arguments.lambdas, arguments.fits, incoming.const_data_ptr<scalar_t>(),
                     grad_stats.mutable_data_ptr<double>());
        });
        return grad_stats;
    }

    static LossAndGrad loss_and_grad(const Tensor& logits, IAL_PIXEL_PARAMETERS, IAL_COMBINE_PARAMETERS,
                                     std::optional<bool> align_corners, const OptionalTensor& expected,
                                     bool one_launch) {
        TORCH_CHECK_VALUE(reduction != "none", "reduction is 'none', expected 'mean' or 'sum'");
        check_expected(expected, logits);
        const Inputs inputs{logits, IAL_PIXEL_ARGUMENTS, align_corners};
        inputs.check();
        check_limits(logits.size(0), logits.size(1), inputs.levels());
        const Launcher launcher(logits);
        const at::ScalarType dtype = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
        const bool one_pass = inputs.one_pass(expected);
        if (!one_pass && !(one_launch && has_one_launch(launcher, inputs, factor_scope))) {
            // Computing the gradient now would not save a pass over the logits.
            const Tensor stats = reduce(logits, IAL_PIXEL_ARGUMENTS, false, align_corners);
            const auto [loss, f] = combine(stats, IAL_COMBINE_ARGUMENTS, dtype);
            return without_grad(loss, f, stats, logits);
        }
        const TrainingResults to(logits, inputs.levels());
        CombineArguments arguments(make_combine(to.stats, IAL_COMBINE_ARGUMENTS));
        const CombineResults results(arguments.combine, to.stats.options(), dtype);
        const Tensor whole_divisor = at::empty({}, to.stats.options());
        AT_DISPATCH_FLOATING_TYPES_AND2(
            at::kHalf, at::kBFloat16, logits.scalar_type(), "ial_cuda::loss_and_grad", [&] {
                using Typed = Kernels<typename Native<scalar_t>::type, Launcher>;
                if (one_pass)
                    Typed::one_pass(launcher, inputs, arguments.combine, expected, to, whole_divisor);
                else
                    Typed::cooperate(launcher, inputs, arguments, expected, to, results);
            });
        if (one_pass) {
            arguments.combine.divisor = whole_divisor.const_data_ptr<double>();
            launch_combine(launcher, arguments, results);
        }
        return {results.loss, results.f, to.stats, to.grad_stats, to.grad, to.computed_for};
    }

    static void implement(torch::Library& m) {
        m.impl("reduce", reduce);
        m.impl("reduce_backward", reduce_backward);
        m.impl("reduce_backward_", reduce_backward_);
        m.impl("combine", combine);
        m.impl("combine_backward", combine_backward);
        m.impl("loss_and_grad", loss_and_grad);
        m.impl("rescale_", rescale_);
        m.impl("pixel_nll", pixel_nll);
        m.impl("pixel_nll_backward", pixel_nll_backward);
    }

 private:
    // The tensors of rescale_.
    struct Rescaling {
        const Tensor &grad_loss, &computed_for;
        const OptionalTensor& expected;
    };

    // Without grad_stats, dL/dS is 1 and the other derivatives are 0.
    static void write_grad(const Inputs& inputs, const Tensor* grad_stats, const Rescaling* rescaling,
                           const Tensor& grad) {
        inputs.check();
        if (grad_stats) inputs.check_grad_stats(*grad_stats);
        inputs.check_grad(grad);
        check_limits(inputs.logits.size(0), inputs.logits.size(1), inputs.levels());
        const Launcher launcher(grad);
        if (grad.numel() == 0) return;
        AT_DISPATCH_FLOATING_TYPES_AND2(
            at::kHalf, at::kBFloat16, grad.scalar_type(), "ial_cuda::reduce_backward", [&] {
                using T = typename Native<scalar_t>::type;
                using A = typename Arithmetic<T>::A;
                Incoming<A> incoming{};
                Tensor grad_loss;
                if (rescaling) {
                    grad_loss = rescaling->grad_loss.to(c10::CppTypeToScalarType<A>::value);
                    incoming.grad_loss = grad_loss.const_data_ptr<A>();
                    incoming.computed_for = rescaling->computed_for.template const_data_ptr<double>();
                    if (rescaling->expected)
                        incoming.expected = rescaling->expected->template mutable_data_ptr<double>();
                }
                const double* const derivatives =
                    grad_stats ? grad_stats->template const_data_ptr<double>() : nullptr;
                Kernels<T, Launcher>::reduce_backward(launcher, inputs, derivatives, incoming, grad);
            });
    }

    static void launch_combine(const Launcher& launcher, const CombineArguments& arguments,
                               const CombineResults& results) {
        AT_DISPATCH_FLOATING_TYPES(results.loss.scalar_type(), "ial_cuda::combine", [&] {
            launcher(combine_kernel<scalar_t>, dim3(1), kThreads, arguments.shared, arguments.combine,
                     arguments.lambdas, arguments.fits, results.pointers<scalar_t>());
        });
    }

    // Whether one launch of several levels is possible: each thread reads and writes vectors, all blocks are
    // resident, and their sums fit into shared memory.
    static bool has_one_launch(const Launcher& launcher, const Inputs& inputs,
                               std::string_view factor_scope) {
        const Tensor &logits = inputs.logits, &target = inputs.target;
        const int64_t pooled_images = is_pooled(factor_scope) ? logits.size(0) : 1;
        const int64_t classes = logits.size(1);
        return !inputs.align_corners && logits.scalar_type() != at::kDouble && logits.numel() > 0 &&
               logits.is_contiguous() && target.is_contiguous() &&
               (!inputs.pixel_weight || inputs.pixel_weight->is_contiguous()) &&
               target.numel() / logits.size(0) * logits.itemsize() % 16 == 0 &&
               aligned(logits.const_data_ptr(), 16) && classes <= kRegisterClasses &&
               inputs.levels() <= kMaxCooperativeLevels && launcher.cooperative() &&
               pooled_images <= launcher.multiprocessors() &&
               min_cooperative_bytes(classes, inputs.levels(), pooled_images) <=
                   static_cast<size_t>(launcher.shared_bytes());
    }
};

}  // namespace ial::gpu
