// The operators on top of the launches of cuda/launch.h: arguments checked, outputs allocated.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <string_view>

#include "launch.h"

namespace ial {
namespace gpu {

// The kernels' words for torch's types.
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
    static Tensor reduce(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                         const OptionalTensor& pixel_weight, at::IntArrayRef class_levels,
                         int64_t ignore_index, std::string_view gradient, bool,
                         std::optional<bool> align_corners) {
        const Inputs inputs{logits,       target,       weight,   pixel_weight,
                            class_levels, ignore_index, gradient, align_corners};
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

    static void gradient_into(const Inputs& inputs, const Tensor& table, const OptionalTensor& grad_loss,
                              const Tensor& grad) {
        inputs.check();
        inputs.check_grad_stats(table);
        inputs.check_grad(grad);
        if (grad_loss) check_grad_loss(*grad_loss, table, 1);
        check_limits(inputs.logits.size(0), inputs.logits.size(1), inputs.levels());
        const Launcher launcher(grad);
        if (grad.numel() == 0) return;
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(),
                                        "ial_cuda::reduce_backward", [&] {
                                            Kernels<typename Native<scalar_t>::type, Launcher>::gradient(
                                                launcher, inputs, table, grad_loss, inputs.exact(), grad);
                                        });
    }

    static Tensor gradient(const Tensor& logits, const Tensor& table, const Tensor& target,
                           const OptionalTensor& weight, const OptionalTensor& pixel_weight,
                           at::IntArrayRef class_levels, int64_t ignore_index, std::string_view gradient,
                           std::optional<bool> align_corners) {
        Tensor grad = at::empty_like(logits);
        gradient_into(
            {logits, target, weight, pixel_weight, class_levels, ignore_index, gradient, align_corners},
            table, {}, grad);
        return grad;
    }

    static void gradient_(const Tensor& logits, const Tensor& table, const Tensor& target,
                          const OptionalTensor& weight, const OptionalTensor& pixel_weight,
                          at::IntArrayRef class_levels, int64_t ignore_index, std::string_view gradient) {
        gradient_into({logits, target, weight, pixel_weight, class_levels, ignore_index, gradient}, table, {},
                      logits);
    }

    static void rescale_(const Tensor& grad, const Tensor& grad_loss, const Tensor& logits,
                         const Tensor& table, const Tensor& target, const OptionalTensor& weight,
                         const OptionalTensor& pixel_weight, at::IntArrayRef class_levels,
                         int64_t ignore_index, std::string_view gradient) {
        gradient_into({logits, target, weight, pixel_weight, class_levels, ignore_index, gradient}, table,
                      grad_loss, grad);
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
        AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "ial_cuda::combine_backward", [&] {
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
        const Inputs inputs{logits, target, weight, pixel_weight, class_levels, ignore_index, gradient};
        inputs.check();
        check_limits(logits.size(0), logits.size(1), inputs.levels());
        const Launcher launcher(logits);
        TORCH_CHECK_VALUE(reduction != "none", "reduction is 'none', expected 'mean' or 'sum'");
        const at::ScalarType dtype = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
        if (!has_one_launch(launcher, logits, target, pixel_weight, inputs.levels(), factor_scope)) {
            const Tensor stats =
                reduce(logits, target, weight, pixel_weight, class_levels, ignore_index, gradient, false, {});
            const auto [loss, f] =
                combine(stats, lambdas, alpha, reduction, factor_normalization, factor_scope, dtype);
            const Tensor rows = table(stats, at::ones_like(loss), lambdas, alpha, reduction,
                                      factor_normalization, factor_scope);
            const Tensor grad = Operators::gradient(logits, rows, target, weight, pixel_weight, class_levels,
                                                    ignore_index, gradient, {});
            return {loss, f, stats, rows, grad};
        }
        const Tensor stats =
            at::empty({logits.size(0), inputs.levels(), kStats}, logits.options().dtype(at::kDouble));
        const Tensor rows = at::empty_like(stats), grad = at::empty_like(logits);
        const Global global(
            make_combine(stats, lambdas, alpha, reduction, factor_normalization, factor_scope));
        const Results results(global.combine, stats.options(), dtype);
        const auto one_launch = [&](auto type) {
            Kernels<decltype(type), Launcher>::fused(launcher, inputs, global, inputs.exact(), stats, rows,
                                                     grad, results);
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
    static bool has_one_launch(const Launcher& launcher, const Tensor& logits, const Tensor& target,
                               const OptionalTensor& pixel_weight, int64_t levels,
                               std::string_view factor_scope) {
        const int64_t pooled_images = is_pooled(factor_scope) ? logits.size(0) : 1;
        return logits.scalar_type() != at::kDouble && logits.numel() > 0 && logits.is_contiguous() &&
               target.is_contiguous() && (!pixel_weight || pixel_weight->is_contiguous()) &&
               target.numel() / target.size(0) * logits.itemsize() % 16 == 0 &&
               aligned(logits.const_data_ptr(), 16) && logits.size(1) <= kMostClasses &&
               levels <= kMostFusedLevels && launcher.cooperative() &&
               pooled_images <= launcher.multiprocessors() &&
               least_fused_bytes(logits.size(1), levels, pooled_images) <=
                   static_cast<size_t>(launcher.shared_bytes());
    }

    // Whether it will be faster than several: an image, or all that are pooled, stay on the chip.
    static bool fuses(const Tensor& logits, const Tensor& target, const OptionalTensor& pixel_weight,
                      int64_t levels, std::string_view factor_scope) {
        const Launcher launcher(logits);
        return has_one_launch(launcher, logits, target, pixel_weight, levels, factor_scope) &&
               static_cast<int64_t>(logits.nbytes()) / (is_pooled(factor_scope) ? 1 : logits.size(0)) <=
                   on_chip_bytes(launcher);
    }

    static void implement(torch::Library& m) {
        m.impl("reduce", reduce);
        m.impl("reduce_backward", gradient);
        m.impl("reduce_backward_", gradient_);
        m.impl("combine", combine);
        m.impl("combine_backward", table);
        m.impl("loss_and_grad", fused);
        m.impl("rescale_", rescale_);
        m.impl("fits_on_chip", fuses);
    }
};

}  // namespace gpu
}  // namespace ial
