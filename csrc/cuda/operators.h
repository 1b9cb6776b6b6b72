// The operators for any Launcher (cuda/launch.h): they check the arguments, allocate the outputs and launch.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <string_view>

#include "kernels.h"

namespace ial::gpu {

// The kernels' type for a type of torch.
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
        write_grad({logits, IAL_PIXEL_ARGUMENTS, align_corners}, grad_stats, {}, grad);
        return grad;
    }

    static void reduce_backward_(const Tensor& logits, const Tensor& grad_stats, IAL_PIXEL_PARAMETERS) {
        write_grad({logits, IAL_PIXEL_ARGUMENTS}, grad_stats, {}, logits);
    }

    static void rescale_(const Tensor& grad, const Tensor& grad_loss, const Tensor& computed_for,
                         const Tensor& logits, const Tensor& grad_stats, IAL_PIXEL_PARAMETERS,
                         std::optional<bool> align_corners, const OptionalTensor& expected) {
        write_grad({logits, IAL_PIXEL_ARGUMENTS, align_corners}, at::mul(grad_stats, grad_loss), {}, grad);
    }

    static std::tuple<Tensor, Tensor> combine(const Tensor& stats, IAL_COMBINE_PARAMETERS,
                                              at::ScalarType dtype) {
        const CombineArguments arguments(make_combine(stats, IAL_COMBINE_ARGUMENTS));
        const Combine& c = arguments.combine;
        const Launcher launcher(stats);
        const CombineResults results(c, stats.options(), dtype);
        AT_DISPATCH_FLOATING_TYPES(dtype, "ial_cuda::combine", [&] {
            launcher(combine_kernel<scalar_t>, dim3(1), kThreads, arguments.shared, c, arguments.lambdas,
                     arguments.fits, results.pointers<scalar_t>());
        });
        return {results.loss, results.f};
    }

    static Tensor combine_backward(const Tensor& stats, const Tensor& grad_loss, IAL_COMBINE_PARAMETERS) {
        const CombineArguments arguments(make_combine(stats, IAL_COMBINE_ARGUMENTS));
        const Combine& c = arguments.combine;
        check_grad_loss(grad_loss, stats, c.reduction == Reduction::kNone ? c.batch : 1);
        const Launcher launcher(stats);
        Tensor grad_stats = at::empty_like(stats);
        if (c.batch == 0) return grad_stats;  // the kernel writes to the row of its first image
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
                                     std::optional<bool> one_launch) {
        TORCH_CHECK_VALUE(reduction != "none", "reduction is 'none', expected 'mean' or 'sum'");
        check_expected(expected, logits);
        const at::ScalarType dtype = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
        const Tensor stats = reduce(logits, IAL_PIXEL_ARGUMENTS, false, align_corners);
        const Tensor one = at::ones({}, stats.options());
        const Tensor computed_for = expected ? expected->select(0, 0).clone() : one;
        const auto [loss, f] = combine(stats, IAL_COMBINE_ARGUMENTS, dtype);
        const Tensor grad_stats = combine_backward(stats, one, IAL_COMBINE_ARGUMENTS);
        Tensor grad = at::empty({0}, logits.options());
        if (Inputs{logits, IAL_PIXEL_ARGUMENTS, align_corners}.one_pass(expected))
            grad = reduce_backward(logits, at::mul(grad_stats, computed_for), IAL_PIXEL_ARGUMENTS,
                                   align_corners);
        return {loss, f, stats, grad_stats, grad, computed_for};
    }

    // Whether one launch will be faster than several: an image, or all that are pooled, stay on the chip.
    static bool fits_on_chip(const Tensor& logits, const Tensor& target, const OptionalTensor& pixel_weight,
                             int64_t levels, std::string_view factor_scope) {
        const Launcher launcher(logits);
        return has_one_launch(launcher, logits, target, pixel_weight, levels, factor_scope) &&
               static_cast<int64_t>(logits.nbytes()) / (is_pooled(factor_scope) ? 1 : logits.size(0)) <=
                   on_chip_bytes(launcher);
    }

    static void implement(torch::Library& m) {
        m.impl("reduce", reduce);
        m.impl("reduce_backward", reduce_backward);
        m.impl("reduce_backward_", reduce_backward_);
        m.impl("combine", combine);
        m.impl("combine_backward", combine_backward);
        m.impl("loss_and_grad", loss_and_grad);
        m.impl("rescale_", rescale_);
    }

 private:
    static void write_grad(const Inputs& inputs, const Tensor& grad_stats, const OptionalTensor& grad_loss,
                           const Tensor& grad) {
        inputs.check();
        inputs.check_grad_stats(grad_stats);
        inputs.check_grad(grad);
        if (grad_loss) check_grad_loss(*grad_loss, grad_stats, 1);
        check_limits(inputs.logits.size(0), inputs.logits.size(1), inputs.levels());
        const Launcher launcher(grad);
        if (grad.numel() == 0) return;
        AT_DISPATCH_FLOATING_TYPES_AND2(
            at::kHalf, at::kBFloat16, grad.scalar_type(), "ial_cuda::reduce_backward", [&] {
                Kernels<typename Native<scalar_t>::type, Launcher>::reduce_backward(
                    launcher, inputs, grad_stats, grad_loss, inputs.exact(), grad);
            });
    }

    // Whether one launch can do it: each thread reads and writes vectors, all blocks are resident, and there
    // is room for their sums.
    static bool has_one_launch(const Launcher& launcher, const Tensor& logits, const Tensor& target,
                               const OptionalTensor& pixel_weight, int64_t levels,
                               std::string_view factor_scope) {
        const int64_t pooled_images = is_pooled(factor_scope) ? logits.size(0) : 1;
        return logits.scalar_type() != at::kDouble && logits.numel() > 0 && logits.is_contiguous() &&
               target.is_contiguous() && (!pixel_weight || pixel_weight->is_contiguous()) &&
               target.numel() / logits.size(0) * logits.itemsize() % 16 == 0 &&
               aligned(logits.const_data_ptr(), 16) && logits.size(1) <= kRegisterClasses &&
               levels <= kMaxCooperativeLevels && launcher.cooperative() &&
               pooled_images <= launcher.multiprocessors() &&
               min_cooperative_bytes(logits.size(1), levels, pooled_images) <=
                   static_cast<size_t>(launcher.shared_bytes());
    }
};

}  // namespace ial::gpu
