// The operators on CPU tensors, and their registration.
// They check the arguments and allocate the outputs. launch.h runs the kernels.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../inputs.h"
#include "gradient_memory.h"
#include "launch.h"

namespace ial {

IAL_KERNELS(extern, double)
IAL_KERNELS(extern, float)
IAL_KERNELS(extern, at::Half)
IAL_KERNELS(extern, at::BFloat16)

namespace {

Tensor reduce_cpu(const Tensor& logits, IAL_PIXEL_PARAMETERS, bool, std::optional<bool> align_corners) {
    const Inputs inputs{logits, IAL_PIXEL_ARGUMENTS, align_corners};
    inputs.check();
    return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "ial_cuda::reduce",
                                           [&] { return launch_reduce<scalar_t>(inputs); });
}

// grad_stats: undefined for pixel_nll_backward.
void reduce_backward_into(const Inputs& inputs, const Tensor& grad_stats, const Tensor& grad, bool fresh) {
    if (grad_stats.defined()) inputs.check_grad_stats(grad_stats);
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, grad.scalar_type(), "ial_cuda::reduce_backward",
        [&] { launch_reduce_backward<scalar_t>(inputs, grad_stats, grad, fresh); });
}

Tensor reduce_backward_cpu(const Tensor& logits, const Tensor& grad_stats, IAL_PIXEL_PARAMETERS,
                           std::optional<bool> align_corners) {
    const Inputs inputs{logits, IAL_PIXEL_ARGUMENTS, align_corners};
    inputs.check();
    const Tensor grad = empty_gradient(logits);
    reduce_backward_into(inputs, grad_stats, grad, /*fresh=*/true);
    return grad;
}

void reduce_backward_inplace_cpu(const Tensor& logits, const Tensor& grad_stats, IAL_PIXEL_PARAMETERS) {
    const Inputs inputs{logits, IAL_PIXEL_ARGUMENTS};
    inputs.check();
    inputs.check_grad(logits);
    reduce_backward_into(inputs, grad_stats, logits, /*fresh=*/false);
}

Tensor one_value(double value, at::ScalarType dtype = at::kDouble) {
    Tensor result = at::empty({}, dtype);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "ial_cuda::one_value", [&] {
        *result.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(value);
    });
    return result;
}

std::tuple<Tensor, Tensor> combine_cpu(const Tensor& stats, IAL_COMBINE_PARAMETERS, at::ScalarType dtype) {
    const Combine c = make_combine(stats, IAL_COMBINE_ARGUMENTS);
    Tensor shared = at::empty({c.pool_batch ? 1 : c.batch, c.levels - 1}, stats.options());
    double* f = shared.mutable_data_ptr<double>();
    std::vector<double> losses(c.batch);
    if (c.pool_batch) factors(c, 0, c.batch, f);
    for (int64_t n = 0; n < c.batch; ++n) {
        if (!c.pool_batch) factors(c, n, n + 1, f + n * (c.levels - 1));
        losses[n] = image_loss(c, n, f + (c.pool_batch ? 0 : n * (c.levels - 1)));
    }
    if (c.reduction == Reduction::kNone) {
        Tensor result = at::empty({c.batch}, stats.options());
        std::copy(losses.begin(), losses.end(), result.mutable_data_ptr<double>());
        return {result.to(dtype), shared};
    }
    double loss = std::accumulate(losses.begin(), losses.end(), 0.0);
    if (c.reduction == Reduction::kMean) {
        const double divisor = c.mean_divisor();
        loss = divisor != 0 ? loss / divisor : 0;
    }
    return {one_value(loss, dtype), shared};
}

Tensor combine_backward_cpu(const Tensor& stats, const Tensor& grad_loss, IAL_COMBINE_PARAMETERS) {
    const Combine c = make_combine(stats, IAL_COMBINE_ARGUMENTS);
    check_grad_loss(grad_loss, stats, c.reduction == Reduction::kNone ? c.batch : 1);
    Tensor result = at::empty_like(stats);
    if (c.batch == 0) return result;  // combine_backward would write to the row of the first image
    const Tensor grad = grad_loss.to(at::kDouble).contiguous();
    const double* g = grad.const_data_ptr<double>();
    double* to = result.mutable_data_ptr<double>();
    const double mean_divisor = c.mean_divisor();
    if (c.pool_batch)
        combine_backward(c, 0, c.batch, g, mean_divisor, to);
    else
        for (int64_t n = 0; n < c.batch; ++n) combine_backward(c, n, n + 1, g, mean_divisor, to);
    return result;
}

LossAndGrad loss_and_grad_cpu(const Tensor& logits, IAL_PIXEL_PARAMETERS, IAL_COMBINE_PARAMETERS,
                              std::optional<bool> align_corners, const OptionalTensor& expected, bool) {
    TORCH_CHECK_VALUE(reduction != "none", "reduction is 'none', expected 'mean' or 'sum'");
    const Inputs inputs{logits, IAL_PIXEL_ARGUMENTS, align_corners};
    inputs.check();
    check_expected(expected, logits);
    const at::ScalarType dtype = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    if (!inputs.one_pass(expected)) {
        const Tensor stats = reduce_cpu(logits, IAL_PIXEL_ARGUMENTS, false, align_corners);
        const auto [loss, f] = combine_cpu(stats, IAL_COMBINE_ARGUMENTS, dtype);
        return without_grad(loss, f, stats, logits);
    }
    const Tensor computed_for = one_value(expected ? *expected->const_data_ptr<double>() : 1);
    const Tensor grad = empty_gradient(logits);
    Tensor stats = at::empty({logits.size(0), 1, kStats}, at::kDouble), grad_stats;
    std::fill_n(stats.mutable_data_ptr<double>(), stats.numel(), 0.0);
    OptionalTensor divided_by = divisor;
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, logits.scalar_type(), "ial_cuda::loss_and_grad", [&] {
            const OnePass<scalar_t> pass(inputs, grad);
            if (reduction == "mean" && !divisor) divided_by = one_value(pass.sum_weights());
            // With one level, grad_stats depends on the divisor alone.
            grad_stats = combine_backward_cpu(stats, one_value(1), divided_by, lambdas, alpha, reduction,
                                              factor_normalization, factor_scope);
            stats = pass.run(grad_stats, *computed_for.const_data_ptr<double>());
        });
    const auto [loss, f] =
        combine_cpu(stats, divided_by, lambdas, alpha, reduction, factor_normalization, factor_scope, dtype);
    return {loss, f, stats, grad_stats, grad, computed_for};
}

void rescale_cpu(const Tensor& grad, const Tensor& grad_loss, const Tensor& computed_for,
                 const Tensor& logits, const Tensor& grad_stats, IAL_PIXEL_PARAMETERS,
                 std::optional<bool> align_corners, const OptionalTensor& expected) {
    const Inputs inputs{logits, IAL_PIXEL_ARGUMENTS, align_corners};
    inputs.check();
    inputs.check_grad(grad);
    check_grad_loss(grad_loss, grad_stats, 1);
    check_expected(expected, logits);
    const double incoming = grad_loss.item<double>();
    if (incoming != computed_for.item<double>()) {
        inputs.check_grad_stats(grad_stats);
        const Tensor now = at::empty_like(grad_stats);
        const double* const from = grad_stats.const_data_ptr<double>();
        std::transform(from, from + now.numel(), now.mutable_data_ptr<double>(),
                       [&](double derivative) { return scaled(derivative, incoming); });
        reduce_backward_into(inputs, now, grad, /*fresh=*/true);
    }
    if (!expected) return;
    double* const state = expected->mutable_data_ptr<double>();
    if (incoming == state[1] && std::isfinite(incoming)) state[0] = incoming;
    state[1] = incoming;
}

Tensor pixel_nll_cpu(const Tensor& logits, IAL_NLL_PARAMETERS) {
    const NllInputs nll(logits, std::nullopt, IAL_NLL_ARGUMENTS);
    const Tensor map = nll.empty_map();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "ial_cuda::pixel_nll",
                                    [&] { launch_pixel_nll<scalar_t>(nll.inputs, map); });
    return map;
}

Tensor pixel_nll_backward_cpu(const Tensor& logits, const Tensor& grad_nll, IAL_NLL_PARAMETERS) {
    const NllInputs nll(logits, grad_nll, IAL_NLL_ARGUMENTS);
    const Tensor grad = empty_gradient(logits);
    reduce_backward_into(nll.inputs, Tensor(), grad, /*fresh=*/true);
    return grad;
}

}  // namespace

const char* cpu_instruction_set() {
    switch (isa()) {
        case Isa::kAvx512:
            return "AVX-512";
        case Isa::kAvx2:
            return "AVX2";
        default:
            return "baseline";
    }
}

TORCH_LIBRARY_IMPL(ial_cuda, CPU, m) {
    m.impl("reduce", reduce_cpu);
    m.impl("reduce_backward", reduce_backward_cpu);
    m.impl("reduce_backward_", reduce_backward_inplace_cpu);
    m.impl("combine", combine_cpu);
    m.impl("combine_backward", combine_backward_cpu);
    m.impl("loss_and_grad", loss_and_grad_cpu);
    m.impl("rescale_", rescale_cpu);
    m.impl("pixel_nll", pixel_nll_cpu);
    m.impl("pixel_nll_backward", pixel_nll_backward_cpu);
}

}  // namespace ial
