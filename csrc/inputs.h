// Checks of the operators' arguments for all devices, and the plain structs that the kernels take.
// ial_cuda/validation.py checks the same and more in Python. The checks here protect memory when torch.ops is
// called directly.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "bilinear.h"
#include "layout.h"
#include "loss.h"

namespace ial {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The results of the operator loss_and_grad (library.cpp): loss, factors, stats, grad_stats, grad,
// computed_for.
using LossAndGrad = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The results when the gradient is left to the backward pass: grad_stats, grad and computed_for are empty, of
// shape (0,). A gradient has two dimensions or more.
LossAndGrad without_grad(const Tensor& loss, const Tensor& factors, const Tensor& stats,
                         const Tensor& logits);
inline bool has_grad(const LossAndGrad& results) { return std::get<4>(results).dim() > 1; }

// clang-format off
// Parameters that several operators share, in the order of their schemas in library.cpp. The *_ARGUMENTS
// macros pass them on.
#define IAL_PIXEL_PARAMETERS                                                        \
    const Tensor& target, const OptionalTensor& weight, const OptionalTensor& pixel_weight, \
    at::IntArrayRef class_levels, int64_t ignore_index, std::string_view gradient, double label_smoothing
#define IAL_PIXEL_ARGUMENTS \
    target, weight, pixel_weight, class_levels, ignore_index, gradient, label_smoothing
#define IAL_COMBINE_PARAMETERS                                                    \
    const OptionalTensor& divisor, at::ArrayRef<double> lambdas, double alpha,    \
    std::string_view reduction, std::string_view factor_normalization, std::string_view factor_scope
#define IAL_COMBINE_ARGUMENTS divisor, lambdas, alpha, reduction, factor_normalization, factor_scope
#define IAL_NLL_PARAMETERS                                                                         \
    const Tensor& target, const OptionalTensor& weight, int64_t ignore_index, double label_smoothing, \
    std::optional<bool> align_corners
#define IAL_NLL_ARGUMENTS target, weight, ignore_index, label_smoothing, align_corners
// clang-format on

// The arguments of reduce and reduce_backward. Checks throw ValueError or TypeError with the argument's name,
// what it is and what was expected.
struct Inputs {
    const Tensor& logits;
    const Tensor& target;
    const OptionalTensor& weight;
    const OptionalTensor& pixel_weight;
    at::IntArrayRef class_levels;
    int64_t ignore_index;
    std::string_view gradient;
    double label_smoothing;
    // Set for coarse logits: how they are upsampled to the size of the target.
    std::optional<bool> align_corners = std::nullopt;

    void check() const;
    void check_grad_stats(const Tensor& grad_stats) const;
    void check_grad(const Tensor& grad) const;  // grad will be overwritten

    int levels() const;
    Label label() const;
    bool exact() const;  // gradient = "exact"

    // Whether loss_and_grad computes loss and gradient in one pass over the logits. The loss of float16
    // logits is usually scaled, so the incoming gradient is not 1. Unless it is known in advance
    // (`expected`), a gradient computed with the loss would have to be computed again.
    bool one_pass(const OptionalTensor& expected) const;

    // The layouts of full-size logits and of coarse logits. `grad` has the shape of the logits, or is a map
    // of the pixels with one class.
    Layout layout(const Tensor& grad) const;
    Upsampling upsampling(const Tensor& grad) const;
};

// The checked arguments of pixel_nll and pixel_nll_backward, as those of one level. The derivative of a
// pixel's nll is that of one level's S, with the incoming gradient `grad_nll` as the weight of the pixel.
struct NllInputs {
    const OptionalTensor grad_nll;
    const std::vector<int64_t> class_levels;
    const Inputs inputs;

    // grad_nll is given in the backward pass.
    NllInputs(const Tensor& logits, OptionalTensor grad_nll, IAL_NLL_PARAMETERS);
    NllInputs(const NllInputs&) = delete;

    // A new map, contiguous, in the shape of the target.
    Tensor empty_map() const;
};

// The checked arguments of combine and combine_backward. The result points to the data of stats, divisor and
// lambdas.
Combine make_combine(const Tensor& stats, IAL_COMBINE_PARAMETERS);

// Checks grad_loss of combine_backward and rescale_: the incoming gradient of the loss, `values` numbers on
// the device of stats.
void check_grad_loss(const Tensor& grad_loss, const Tensor& stats, int64_t values);

// Checks `expected` of loss_and_grad and rescale_: the incoming gradient that loss_and_grad computes for.
void check_expected(const OptionalTensor& expected, const Tensor& logits);

bool is_pooled(std::string_view factor_scope);  // factor_scope = "batch"

}  // namespace ial
