// Checks of the operators' arguments, and the plain structs that the kernels take.
// Each message names the argument, what it is and what was expected.
#include "inputs.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace ial {
namespace {

// The index of `value` in `choices`.
int choose(const char* name, std::string_view value, std::initializer_list<std::string_view> choices) {
    const auto found = std::find(choices.begin(), choices.end(), value);
    if (found != choices.end()) return static_cast<int>(found - choices.begin());
    std::string expected;
    for (const auto& choice : choices)
        expected += c10::str(expected.empty()               ? "'"
                             : &choice + 1 == choices.end() ? " or '"
                                                            : ", '",
                             choice, "'");
    TORCH_CHECK_VALUE(false, name, " is '", value, "', expected ", expected);
}

}  // namespace

int Inputs::levels() const {
    return static_cast<int>(*std::max_element(class_levels.begin(), class_levels.end())) + 1;
}

bool Inputs::exact() const { return choose("gradient", gradient, {"exact", "paper"}) == 0; }

bool Inputs::one_pass(const OptionalTensor& expected) const {
    return levels() == 1 && logits.numel() > 0 && (logits.scalar_type() != at::kHalf || expected);
}

bool is_pooled(std::string_view factor_scope) {
    return choose("factor_scope", factor_scope, {"image", "batch"}) == 1;
}

Label Inputs::label() const {
    const auto type = target.scalar_type();
    return type == at::kByte ? Label::kUInt8 : type == at::kInt ? Label::kInt32 : Label::kInt64;
}

void Inputs::check() const {
    const auto classes = static_cast<int64_t>(class_levels.size());
    TORCH_CHECK_VALUE(logits.dim() >= 2, "logits has shape ", logits.sizes(), ", expected (N, C, *spatial)");
    TORCH_CHECK_TYPE(at::isFloatingType(logits.scalar_type()), "logits has dtype ", logits.scalar_type(),
                     ", expected float64, float32, float16 or bfloat16");
    TORCH_CHECK_VALUE(classes > 0 && logits.size(1) == classes, "logits has shape ", logits.sizes(),
                      ", expected (N, C, *spatial) with C = ", classes, " classes of the hierarchy");
    for (const int64_t level : class_levels)
        TORCH_CHECK_VALUE(level >= 0 && level < classes, "class_levels has level ", level, ", expected 0 to ",
                          classes - 1);

    at::DimVector pixels(logits.sizes());  // (N, *spatial)
    pixels.erase(pixels.begin() + 1);
    if (align_corners) {
        TORCH_CHECK_VALUE(logits.dim() == 4 && target.dim() == 3 && target.size(0) == logits.size(0) &&
                              logits.size(2) > 0 && logits.size(3) > 0 && target.size(1) > 0 &&
                              target.size(2) > 0,
                          "logits has shape ", logits.sizes(), " and target ", target.sizes(),
                          ", expected (N, C, h, w) and (N, H, W) with h, w, H and W above 0, to upsample");
        TORCH_CHECK_VALUE(
            std::max({logits.size(2), logits.size(3), target.size(1), target.size(2)}) <= kMaxSide,
            "logits has shape ", logits.sizes(), " and target ", target.sizes(),
            ", expected h, w, H and W up to ", kMaxSide, ", to upsample");
        pixels = at::DimVector(target.sizes());
    }

    const auto check_pixels = [&](const char* name, const Tensor& tensor) {
        TORCH_CHECK_VALUE(tensor.sizes() == pixels, name, " has shape ", tensor.sizes(),
                          ", expected (N, *spatial) of logits ", logits.sizes());
    };
    const auto check_device = [&](const char* name, const Tensor& tensor) {
        TORCH_CHECK_VALUE(tensor.device() == logits.device(), name, " is on ", tensor.device(), ", expected ",
                          logits.device(), " like logits");
    };
    const auto check_floating = [](const char* name, const Tensor& tensor) {
        TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()), name, " has dtype ", tensor.scalar_type(),
                         ", expected a floating type");
    };
    check_pixels("target", target);
    check_device("target", target);
    const auto type = target.scalar_type();
    TORCH_CHECK_TYPE(type == at::kLong || type == at::kInt || type == at::kByte, "target has dtype ", type,
                     ", expected int64, int32 or uint8");
    if (weight) {
        TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == classes, "weight has shape ",
                          weight->sizes(), ", expected (", classes, ",), one per class");
        check_device("weight", *weight);
        check_floating("weight", *weight);
    }
    if (pixel_weight) {
        check_pixels("pixel_weight", *pixel_weight);
        check_device("pixel_weight", *pixel_weight);
        check_floating("pixel_weight", *pixel_weight);
    }
    TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing is ", label_smoothing,
                      ", expected 0 to 1");
    exact();  // checked here too: reduce reads it in its backward only, and an error there comes late
}

void Inputs::check_grad_stats(const Tensor& grad_stats) const {
    TORCH_CHECK_VALUE(grad_stats.sizes() == at::IntArrayRef({logits.size(0), levels(), kStats}) &&
                          grad_stats.is_contiguous() && grad_stats.scalar_type() == at::kDouble &&
                          grad_stats.device() == logits.device(),
                      "grad_stats has shape ", grad_stats.sizes(), " of ", grad_stats.scalar_type(), " on ",
                      grad_stats.device(), ", expected (", logits.size(0), ", ", levels(), ", ", int(kStats),
                      ") of Double, contiguous, on ", logits.device());
}

void Inputs::check_grad(const Tensor& grad) const {
    TORCH_CHECK_VALUE(grad.sizes() == logits.sizes() && grad.scalar_type() == logits.scalar_type() &&
                          grad.device() == logits.device(),
                      "grad has shape ", grad.sizes(), " of ", grad.scalar_type(), " on ", grad.device(),
                      ", expected ", logits.sizes(), " of ", logits.scalar_type(), " on ", logits.device(),
                      " like logits");
    at::assert_no_internal_overlap(grad);
}

NllInputs::NllInputs(const Tensor& logits, OptionalTensor given_grad_nll, IAL_NLL_PARAMETERS)
    : grad_nll(std::move(given_grad_nll)),
      class_levels(logits.dim() < 2 ? 0 : logits.size(1)),
      inputs{logits,       target,  weight,          grad_nll,     class_levels,
             ignore_index, "exact", label_smoothing, align_corners} {
    TORCH_CHECK_VALUE(
        !grad_nll || (grad_nll->sizes() == target.sizes() && at::isFloatingType(grad_nll->scalar_type()) &&
                      grad_nll->device() == logits.device()),
        "grad_nll has shape ", grad_nll->sizes(), " of ", grad_nll->scalar_type(), " on ", grad_nll->device(),
        ", expected ", target.sizes(), " of a floating type on ", logits.device(), " like logits");
    inputs.check();
}

Tensor NllInputs::empty_map() const {
    const Tensor& logits = inputs.logits;
    const auto dtype = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    return at::empty(inputs.target.sizes(), logits.options().dtype(dtype));
}

void check_grad_loss(const Tensor& grad_loss, const Tensor& stats, int64_t values) {
    TORCH_CHECK_VALUE(grad_loss.numel() == values, "grad_loss has shape ", grad_loss.sizes(), ", expected ",
                      values, " value(s)");
    TORCH_CHECK_VALUE(grad_loss.device() == stats.device(), "grad_loss is on ", grad_loss.device(),
                      ", expected ", stats.device(), " like stats");
}

LossAndGrad without_grad(const Tensor& loss, const Tensor& factors, const Tensor& stats,
                         const Tensor& logits) {
    return {loss,
            factors,
            stats,
            at::empty({0}, stats.options()),
            at::empty({0}, logits.options()),
            at::empty({0}, stats.options())};
}

void check_expected(const OptionalTensor& expected, const Tensor& logits) {
    TORCH_CHECK_VALUE(
        !expected || (expected->numel() == 2 && expected->is_contiguous() &&
                      expected->scalar_type() == at::kDouble && expected->device() == logits.device()),
        "expected has shape ", expected->sizes(), " of ", expected->scalar_type(), " on ", expected->device(),
        ", expected (2,) of Double, contiguous, on ", logits.device());
}

Combine make_combine(const Tensor& stats, IAL_COMBINE_PARAMETERS) {
    TORCH_CHECK_VALUE(stats.dim() == 3 && stats.size(1) >= 1 && stats.size(2) == kStats &&
                          stats.is_contiguous() && stats.scalar_type() == at::kDouble,
                      "stats has shape ", stats.sizes(), " of ", stats.scalar_type(), ", expected (N, g, ",
                      int(kStats), ") of Double, contiguous");
    const int64_t levels = stats.size(1), count = static_cast<int64_t>(lambdas.size());
    TORCH_CHECK_VALUE(count == levels - 1, "lambdas has ", count, " values, expected ", levels - 1, " for ",
                      levels, " levels");
    TORCH_CHECK_VALUE(!divisor || (divisor->numel() == 1 && divisor->scalar_type() == at::kDouble &&
                                   divisor->device() == stats.device()),
                      "divisor has shape ", divisor->sizes(), " of ", divisor->scalar_type(), " on ",
                      divisor->device(), ", expected one value of Double on ", stats.device());
    Combine combine{};
    combine.stats = stats.const_data_ptr<double>();
    combine.lambdas = lambdas.data();
    combine.divisor = divisor ? divisor->const_data_ptr<double>() : nullptr;
    combine.batch = stats.size(0);
    combine.levels = static_cast<int>(levels);
    combine.alpha = alpha;
    combine.reduction = static_cast<Reduction>(choose("reduction", reduction, {"mean", "sum", "none"}));
    combine.normalize_factors = choose("factor_normalization", factor_normalization, {"mean", "sum"}) == 0;
    combine.pool_batch = is_pooled(factor_scope);
    return combine;
}

Layout Inputs::layout(const Tensor& grad) const {
    Layout layout{};
    layout.batch = logits.size(0);
    layout.classes = logits.size(1);
    layout.pixels = 1;
    layout.row = 1;

    struct Operand {
        const Tensor& tensor;
        View& view;
        int64_t spatial;          // the first spatial dimension
        at::DimVector strides{};  // strides of the merged dimensions, innermost first

        int64_t stride(int64_t d) const { return tensor.stride(spatial + d); }
    };
    std::vector<Operand> operands = {
        {logits, layout.logits, 2}, {grad, layout.grad, 2}, {target, layout.target, 1}};
    if (pixel_weight) operands.push_back({*pixel_weight, layout.pixel_weight, 1});
    // The stride of a dimension of size 1 is arbitrary.
    for (const Operand& operand : operands) {
        operand.view.batch = layout.batch > 1 ? operand.tensor.stride(0) : 0;
        operand.view.channel = operand.spatial == 2 && layout.classes > 1 ? operand.tensor.stride(1) : 0;
        operand.view.pixel = 1;
    }

    // From the innermost dimension outwards: merge a dimension with the one inside it if, in every tensor,
    // its stride equals the inner dimension's stride times its size.
    at::DimVector sizes;  // sizes of the merged dimensions, innermost first
    for (int64_t d = logits.dim() - 3; d >= 0; --d) {
        const int64_t size = logits.size(d + 2);
        layout.pixels *= size;
        if (size == 1) continue;
        const bool merge =
            !sizes.empty() && std::all_of(operands.begin(), operands.end(), [&](const Operand& o) {
                return o.stride(d) == o.strides.back() * sizes.back();
            });
        if (merge) {
            sizes.back() *= size;
            continue;
        }
        sizes.push_back(size);
        for (Operand& operand : operands) operand.strides.push_back(operand.stride(d));
    }
    if (sizes.empty()) return layout;
    layout.row = sizes[0];
    layout.outer_rank = static_cast<int>(sizes.size()) - 1;
    TORCH_CHECK_VALUE(layout.outer_rank <= kMaxOuter, "logits has ", layout.outer_rank + 1,
                      " spatial dimensions that cannot be merged, expected at most ", kMaxOuter + 1,
                      "; pass logits.contiguous()");
    for (const Operand& operand : operands) operand.view.pixel = operand.strides[0];
    for (int d = 0; d < layout.outer_rank; ++d) {
        const size_t from = sizes.size() - 1 - d;
        layout.outer[d] = sizes[from];
        for (const Operand& operand : operands) operand.view.outer[d] = operand.strides[from];
    }
    return layout;
}

Upsampling Inputs::upsampling(const Tensor& grad) const {
    const auto image = [](const Tensor& tensor) {  // (N, C, y, x) or (N, y, x)
        const int64_t d = tensor.dim() - 2;
        return Image{tensor.stride(0), d == 2 ? tensor.stride(1) : 0, tensor.stride(d), tensor.stride(d + 1)};
    };
    return {logits.size(0),
            logits.size(1),
            Axis(logits.size(2), target.size(1), *align_corners),
            Axis(logits.size(3), target.size(2), *align_corners),
            image(logits),
            image(grad),
            image(target),
            pixel_weight ? image(*pixel_weight) : Image{}};
}

}  // namespace ial
