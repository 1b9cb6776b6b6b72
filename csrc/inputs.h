// What the operators of every device share: their arguments checked, and translated into plain structs.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "bilinear.h"
#include "layout.h"
#include "loss.h"

namespace ial {

constexpr const char* kDoubleBackward =
    "ial_cuda: double backward is not implemented; use backend=\"reference\" where gradients of gradients "
    "are needed";

// The arguments of reduce and gradient. Throws ValueError or TypeError, naming the argument, what came and
// what was expected, for whatever a kernel relies on.
struct Inputs {
    const at::Tensor& logits;
    const at::Tensor& target;
    const std::optional<at::Tensor>& weight;
    const std::optional<at::Tensor>& pixel_weight;
    at::IntArrayRef class_levels;
    int64_t ignore_index;
    // Where given, the logits are coarse, and this is how they are upsampled to the size of the target.
    std::optional<bool> align_corners = std::nullopt;

    int levels() const;
    void check() const;
    void check_table(const at::Tensor& table) const;  // dL/dstats: (N, g, kStats) of Double

    // `grad` has the logits' shape. Of logits as large as the target, and of coarse ones:
    Layout layout(const at::Tensor& grad) const;
    Upsampling upsampling(const at::Tensor& grad) const;
    Label label() const;
};

// The arguments of combine and table, with `stats` and `lambdas` borrowed from the tensor and the list.
Combine make_combine(const at::Tensor& stats, at::ArrayRef<double> lambdas, double alpha,
                     std::string_view reduction, std::string_view factor_normalization,
                     std::string_view factor_scope);

// The gradient of the loss, of so many values, on the device of stats.
void check_grad_loss(const at::Tensor& grad_loss, const at::Tensor& stats, int64_t values);

bool is_exact(std::string_view gradient);
bool is_pooled(std::string_view factor_scope);

const char* cpu_instruction_set();

}  // namespace ial
