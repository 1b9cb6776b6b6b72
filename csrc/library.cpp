// The operators: schemas, checks shared by the devices, autograd, and the Python module that carries them.
#include "inputs.h"

#include "cpu/gradient_memory.h"

#include <ATen/Version.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>

#include "parallel.h"

// The name of the library of operators. Another one, with kernels of its own, can be made of this file.
#ifndef IAL_LIBRARY
#define IAL_LIBRARY ial_cuda
#endif

namespace ial {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// -------------------------------------------------------------------------------------------------
// Checks and translation

int Inputs::levels() const {
    return static_cast<int>(*std::max_element(class_levels.begin(), class_levels.end())) + 1;
}

void Inputs::check() const {
    TORCH_CHECK_VALUE(logits.dim() >= 2, "logits has shape ", logits.sizes(), ", expected (N, C, *spatial)");
    TORCH_CHECK_TYPE(at::isFloatingType(logits.scalar_type()), "logits has dtype ", logits.scalar_type(),
                     ", expected float64, float32, float16 or bfloat16");
    TORCH_CHECK_VALUE(!class_levels.empty() && logits.size(1) == static_cast<int64_t>(class_levels.size()),
                      "logits has shape ", logits.sizes(),
                      ", expected (N, C, *spatial) with C = ", class_levels.size(),
                      " classes of the hierarchy");
    for (const int64_t level : class_levels)
        TORCH_CHECK_VALUE(level >= 0 && level < static_cast<int64_t>(class_levels.size()),
                          "class_levels has level ", level, ", expected 0 to ", class_levels.size() - 1);
    const auto expect = [this](const char* name, const Tensor& tensor) {
        bool same = tensor.dim() == logits.dim() - 1 && tensor.size(0) == logits.size(0);
        for (int64_t d = 1; same && d < tensor.dim(); ++d) same = tensor.size(d) == logits.size(d + 1);
        if (align_corners) same = tensor.dim() == 3 && tensor.sizes() == target.sizes();
        TORCH_CHECK_VALUE(same, name, " has shape ", tensor.sizes(), ", expected (N, *spatial) of logits ",
                          logits.sizes());
        TORCH_CHECK_VALUE(tensor.device() == logits.device(), name, " is on ", tensor.device(), ", expected ",
                          logits.device(), " as logits");
    };
    if (align_corners) {
        TORCH_CHECK_VALUE(logits.dim() == 4 && target.dim() == 3 && target.size(0) == logits.size(0) &&
                              logits.size(2) > 0 && logits.size(3) > 0 && target.size(1) > 0 &&
                              target.size(2) > 0,
                          "logits has shape ", logits.sizes(), " and target ", target.sizes(),
                          ", expected (N, C, h, w) and (N, H, W), none of h, w, H and W 0, to upsample");
        TORCH_CHECK_VALUE(
            std::max({logits.size(2), logits.size(3), target.size(1), target.size(2)}) <= kMaxSide,
            "logits has shape ", logits.sizes(), " and target ", target.sizes(),
            ", expected none of h, w, H and W above ", kMaxSide, " to upsample");
    }
    expect("target", target);
    const auto type = target.scalar_type();
    TORCH_CHECK_TYPE(type == at::kLong || type == at::kInt || type == at::kByte, "target has dtype ", type,
                     ", expected int64, int32 or uint8");
    if (weight) {
        TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == logits.size(1), "weight has shape ",
                          weight->sizes(), ", expected (", logits.size(1), ",), one per class");
        TORCH_CHECK_VALUE(weight->device() == logits.device(), "weight is on ", weight->device(),
                          ", expected ", logits.device(), " as logits");
        TORCH_CHECK_TYPE(at::isFloatingType(weight->scalar_type()), "weight has dtype ",
                         weight->scalar_type(), ", expected a floating type");
    }
    if (pixel_weight) {
        expect("pixel_weight", *pixel_weight);
        TORCH_CHECK_TYPE(at::isFloatingType(pixel_weight->scalar_type()), "pixel_weight has dtype ",
                         pixel_weight->scalar_type(), ", expected a floating type");
    }
}

void Inputs::check_table(const Tensor& table) const {
    TORCH_CHECK_VALUE(table.dim() == 3 && table.size(0) == logits.size(0) && table.size(1) == levels() &&
                          table.size(2) == kStats && table.is_contiguous() &&
                          table.scalar_type() == at::kDouble && table.device() == logits.device(),
                      "grad_stats has shape ", table.sizes(), " of ", table.scalar_type(), " on ",
                      table.device(), ", expected (", logits.size(0), ", ", levels(), ", ", int(kStats),
                      ") of Double, contiguous, on ", logits.device());
}

Label Inputs::label() const {
    const auto type = target.scalar_type();
    return type == at::kByte ? Label::kUInt8 : type == at::kInt ? Label::kInt32 : Label::kInt64;
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
        int64_t spatial;  // the first spatial dimension
    };
    std::vector<Operand> operands = {
        {logits, layout.logits, 2}, {grad, layout.grad, 2}, {target, layout.target, 1}};
    if (pixel_weight) operands.push_back({*pixel_weight, layout.pixel_weight, 1});
    // The stride of a dimension of size 1 may be anything.
    for (const auto& [tensor, view, spatial] : operands) {
        view.batch = layout.batch > 1 ? tensor.stride(0) : 0;
        view.channel = spatial == 2 && layout.classes > 1 ? tensor.stride(1) : 0;
        view.pixel = 1;
    }

    // From the innermost dimension out: one that continues the run of the dimension inside it, in every
    // tensor, is merged with it.
    const int64_t rank = logits.dim() - 2;
    std::vector<int64_t> sizes;  // innermost first
    std::vector<std::vector<int64_t>> strides(operands.size());
    for (int64_t d = rank - 1; d >= 0; --d) {
        const int64_t size = logits.size(d + 2);
        layout.pixels *= size;
        if (size == 1) continue;
        bool merge = !sizes.empty();
        for (size_t i = 0; merge && i < operands.size(); ++i)
            merge = operands[i].tensor.stride(operands[i].spatial + d) == strides[i].back() * sizes.back();
        if (merge) {
            sizes.back() *= size;
            continue;
        }
        sizes.push_back(size);
        for (size_t i = 0; i < operands.size(); ++i)
            strides[i].push_back(operands[i].tensor.stride(operands[i].spatial + d));
    }
    if (sizes.empty()) return layout;
    layout.row = sizes[0];
    layout.outer_rank = static_cast<int>(sizes.size()) - 1;
    TORCH_CHECK_VALUE(layout.outer_rank <= kMaxOuter, "logits has ", layout.outer_rank + 1,
                      " spatial dimensions that cannot be merged, expected at most ", kMaxOuter + 1,
                      "; pass logits.contiguous()");
    for (size_t i = 0; i < operands.size(); ++i) operands[i].view.pixel = strides[i][0];
    for (int d = 0; d < layout.outer_rank; ++d) {
        const size_t from = sizes.size() - 1 - d;
        layout.outer[d] = sizes[from];
        for (size_t i = 0; i < operands.size(); ++i) operands[i].view.outer[d] = strides[i][from];
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

bool is_exact(std::string_view gradient) {
    TORCH_CHECK_VALUE(gradient == "exact" || gradient == "paper", "gradient is \'", gradient,
                      "', expected 'exact' or 'paper'");
    return gradient == "exact";
}

bool is_pooled(std::string_view factor_scope) {
    TORCH_CHECK_VALUE(factor_scope == "image" || factor_scope == "batch", "factor_scope is \'", factor_scope,
                      "', expected 'image' or 'batch'");
    return factor_scope == "batch";
}

void check_grad_loss(const Tensor& grad_loss, const Tensor& stats, int64_t values) {
    TORCH_CHECK_VALUE(grad_loss.numel() == values, "grad_loss has shape ", grad_loss.sizes(), ", expected ",
                      values, " value(s)");
    TORCH_CHECK_VALUE(grad_loss.device() == stats.device(), "grad_loss is on ", grad_loss.device(),
                      ", expected ", stats.device(), " as stats");
}

Combine make_combine(const Tensor& stats, at::ArrayRef<double> lambdas, double alpha,
                     std::string_view reduction, std::string_view factor_normalization,
                     std::string_view factor_scope) {
    TORCH_CHECK_VALUE(stats.dim() == 3 && stats.size(1) >= 1 && stats.size(2) == kStats &&
                          stats.is_contiguous() && stats.scalar_type() == at::kDouble,
                      "stats has shape ", stats.sizes(), " of ", stats.scalar_type(), ", expected (N, g, ",
                      int(kStats), ") of Double, contiguous");
    TORCH_CHECK_VALUE(static_cast<int64_t>(lambdas.size()) == stats.size(1) - 1, "lambdas has ",
                      lambdas.size(), " values, expected ", stats.size(1) - 1, " for ", stats.size(1),
                      " levels");
    TORCH_CHECK_VALUE(reduction == "mean" || reduction == "sum" || reduction == "none", "reduction is \'",
                      reduction, "', expected 'mean', 'sum' or 'none'");
    TORCH_CHECK_VALUE(factor_normalization == "mean" || factor_normalization == "sum",
                      "factor_normalization is \'", factor_normalization, "', expected 'mean' or 'sum'");
    Combine combine{};
    combine.stats = stats.const_data_ptr<double>();
    combine.lambdas = lambdas.data();
    combine.batch = stats.size(0);
    combine.levels = static_cast<int>(stats.size(1));
    combine.alpha = alpha;
    combine.normalize_factors = factor_normalization == "mean";
    combine.pool_batch = is_pooled(factor_scope);
    combine.reduction = reduction == "mean"  ? Reduction::kMean
                        : reduction == "sum" ? Reduction::kSum
                                             : Reduction::kNone;
    return combine;
}

// -------------------------------------------------------------------------------------------------
// Autograd: the derivatives of reduce and combine are operators, too; theirs is not written.

namespace {

using torch::autograd::variable_list;

// A registered operator, found once.
#define IAL_OP(name, ...)                                                                      \
    inline auto& name##_op() {                                                                 \
        static auto handle = c10::Dispatcher::singleton()                                      \
                                 .findSchemaOrThrow(C10_STRINGIZE(IAL_LIBRARY) "::" #name, "") \
                                 .typed<__VA_ARGS__>();                                        \
        return handle;                                                                         \
    }

IAL_OP(reduce, Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                      at::IntArrayRef, int64_t, std::string_view, bool, std::optional<bool>))
IAL_OP(reduce_backward,
       Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
              at::IntArrayRef, int64_t, std::string_view, std::optional<bool>))
IAL_OP(reduce_backward_, void(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                              const OptionalTensor&, at::IntArrayRef, int64_t, std::string_view))
IAL_OP(combine, std::tuple<Tensor, Tensor>(const Tensor&, at::ArrayRef<double>, double, std::string_view,
                                           std::string_view, std::string_view, at::ScalarType))
IAL_OP(loss_and_grad, std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
                          const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                          at::IntArrayRef, int64_t, std::string_view, at::ArrayRef<double>, double,
                          std::string_view, std::string_view, std::string_view))
IAL_OP(rescale_,
       void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
            const OptionalTensor&, at::IntArrayRef, int64_t, std::string_view))
IAL_OP(combine_backward, Tensor(const Tensor&, const Tensor&, at::ArrayRef<double>, double, std::string_view,
                                std::string_view, std::string_view))
#undef IAL_OP

// Nodes of the graph, written out rather than made by torch::autograd::Function, which torch.func does not
// take.
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using NodePtr = decltype(torch::autograd::Edge::function);  // a std::shared_ptr in torch 2.11

template <typename T, typename Pointer = NodePtr, typename... Args>
NodePtr make_node(torch::autograd::edge_list&& inputs, Args&&... args) {
    Pointer node;
    if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
        node.reset(new T(std::forward<Args>(args)...), [](auto* last) { deleteNode(last); });
    else
        node = c10::make_intrusive<T>(std::forward<Args>(args)...);
    node->set_next_edges(std::move(inputs));
    return node;
}

// A derivative already: differentiating it once more is an error, not a silent zero.
struct DerivativeBackward final : Node {
    variable_list apply(variable_list&&) override { TORCH_CHECK_NOT_IMPLEMENTED(false, kDoubleBackward); }
    std::string name() const override { return "DerivativeBackward"; }
};

Tensor as_derivative(const Tensor& result, const Tensor& logits_or_stats, const Tensor& incoming) {
    using namespace torch::autograd;
    if (compute_requires_grad(logits_or_stats, incoming))
        set_history(result, make_node<DerivativeBackward>(collect_next_edges(logits_or_stats, incoming)));
    return result;
}

template <typename... Tensors>
void check_no_tangent(const Tensors&... tensors) {
    TORCH_CHECK_NOT_IMPLEMENTED(!(torch::autograd::isFwGradDefined(tensors) || ...),
                                "ial_cuda: forward-mode derivatives (jvp) are not implemented; "
                                "backend='reference' has them");
}

void check_constant(const char* name, const OptionalTensor& tensor) {
    check_no_tangent(tensor);
    TORCH_CHECK_VALUE(!torch::autograd::compute_requires_grad(tensor), name,
                      " requires a gradient, expected a constant: only logits are differentiated");
}

// The arguments that gradient shares with reduce and fused.
struct Pixels {
    SavedVariable logits, target, weight, pixel_weight;
    std::vector<int64_t> class_levels;
    int64_t ignore_index;
    std::string gradient;
    std::optional<bool> align_corners;

    Pixels(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
           const OptionalTensor& pixel_weight, at::IntArrayRef class_levels, int64_t ignore_index,
           std::string_view gradient, std::optional<bool> align_corners)
        : logits(logits, false),
          target(target, false),
          weight(weight, false),
          pixel_weight(pixel_weight, false),
          class_levels(class_levels.vec()),
          ignore_index(ignore_index),
          gradient(gradient),
          align_corners(align_corners) {}

    // Calls f with the arguments of gradient but for the table, unpacked.
    template <typename F>
    auto unpack(const F& f) const {
        const auto optional = [](const Tensor& tensor) {
            return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
        };
        return f(logits.unpack(), target.unpack(), optional(weight.unpack()),
                 optional(pixel_weight.unpack()));
    }

    Tensor differentiate(const Tensor& table) const {
        return unpack(
            [&](const Tensor& x, const Tensor& y, const OptionalTensor& w, const OptionalTensor& v) {
                return reduce_backward_op().call(x, table, y, w, v, class_levels, ignore_index, gradient,
                                                 align_corners);
            });
    }

    void release() {
        for (SavedVariable* saved : {&logits, &target, &weight, &pixel_weight}) saved->reset_data();
    }
};

struct ReduceBackward final : Node {
    Pixels pixels;
    bool inplace;

    ReduceBackward(Pixels&& pixels, bool inplace) : pixels(std::move(pixels)), inplace(inplace) {}

    variable_list apply(variable_list&& grads) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!grads[0].defined()) return {Tensor()};
        const Tensor table = grads[0].contiguous();
        // A gradient that is to be differentiated keeps its history, and so the logits.
        if (!inplace || at::GradMode::is_enabled()) return {pixels.differentiate(table)};
        return {pixels.unpack([&](const Tensor& x, const auto&... rest) {
            reduce_backward__op().call(x, table, rest..., pixels.class_levels, pixels.ignore_index,
                                       pixels.gradient);
            return x.detach();
        })};
    }

    void release_variables() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        pixels.release();
    }
    std::string name() const override { return "ImportanceAwareLossReduceBackward"; }
};

struct CombineBackward final : Node {
    SavedVariable stats;
    std::vector<double> lambdas;
    double alpha;
    std::string reduction, factor_normalization, factor_scope;

    CombineBackward(const Tensor& stats, at::ArrayRef<double> lambdas, double alpha,
                    std::string_view reduction, std::string_view factor_normalization,
                    std::string_view factor_scope)
        : stats(stats, false),
          lambdas(lambdas.vec()),
          alpha(alpha),
          reduction(reduction),
          factor_normalization(factor_normalization),
          factor_scope(factor_scope) {}

    variable_list apply(variable_list&& grads) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!grads[0].defined()) return {Tensor()};
        return {combine_backward_op().call(stats.unpack(), grads[0], lambdas, alpha, reduction,
                                           factor_normalization, factor_scope)};
    }

    void release_variables() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        stats.reset_data();
    }
    std::string name() const override { return "ImportanceAwareLossCombineBackward"; }
};

// The gradient is there before it is asked for, for an incoming gradient of 1. The first backward pass gives
// it away, made anew where that was not 1; a second one, or one that is to be differentiated, computes
// another.
struct FusedBackward final : Node {
    Pixels pixels;
    SavedVariable table;
    Tensor computed;

    FusedBackward(Pixels&& pixels, const Tensor& table, const Tensor& computed)
        : pixels(std::move(pixels)), table(table, false), computed(computed) {}

    variable_list apply(variable_list&& grads) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!grads[0].defined()) return {Tensor()};
        const Tensor rows = table.unpack();
        if (!computed.defined() || at::GradMode::is_enabled()) return {pixels.differentiate(rows * grads[0])};
        const Tensor grad = std::move(computed);
        pixels.unpack(
            [&](const Tensor& x, const Tensor& y, const OptionalTensor& w, const OptionalTensor& v) {
                rescale__op().call(grad, grads[0], x, rows, y, w, v, pixels.class_levels, pixels.ignore_index,
                                   pixels.gradient);
            });
        return {grad};
    }

    void release_variables() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        pixels.release();
        table.reset_data();
        computed.reset();
    }
    std::string name() const override { return "ImportanceAwareLossBackward"; }
};

// One of our operators, below autograd.
template <auto& op, typename... Args>
auto below_autograd(const Args&... args) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op().call(args...);
}

Tensor reduce_autograd(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                       const OptionalTensor& pixel_weight, at::IntArrayRef class_levels, int64_t ignore_index,
                       std::string_view gradient, bool inplace, std::optional<bool> align_corners) {
    using namespace torch::autograd;
    check_constant("weight", weight);
    check_constant("pixel_weight", pixel_weight);
    check_no_tangent(logits);
    const bool differentiable = compute_requires_grad(logits);
    if (inplace) check_inplace(logits, differentiable);
    const Tensor stats = below_autograd<reduce_op>(logits, target, weight, pixel_weight, class_levels,
                                                   ignore_index, gradient, inplace, align_corners);
    if (differentiable)
        set_history(stats,
                    make_node<ReduceBackward>(collect_next_edges(logits),
                                              Pixels(logits, target, weight, pixel_weight, class_levels,
                                                     ignore_index, gradient, align_corners),
                                              inplace));
    return stats;
}

std::tuple<Tensor, Tensor> combine_autograd(const Tensor& stats, at::ArrayRef<double> lambdas, double alpha,
                                            std::string_view reduction, std::string_view factor_normalization,
                                            std::string_view factor_scope, at::ScalarType dtype) {
    using namespace torch::autograd;
    check_no_tangent(stats);
    const auto [loss, factors] = below_autograd<combine_op>(stats, lambdas, alpha, reduction,
                                                            factor_normalization, factor_scope, dtype);
    if (compute_requires_grad(stats))
        set_history(loss, make_node<CombineBackward>(collect_next_edges(stats), stats, lambdas, alpha,
                                                     reduction, factor_normalization, factor_scope));
    return {loss, factors};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_autograd(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& pixel_weight, at::IntArrayRef class_levels, int64_t ignore_index,
    std::string_view gradient, at::ArrayRef<double> lambdas, double alpha, std::string_view reduction,
    std::string_view factor_normalization, std::string_view factor_scope) {
    using namespace torch::autograd;
    check_constant("weight", weight);
    check_constant("pixel_weight", pixel_weight);
    check_no_tangent(logits);
    const auto results = below_autograd<loss_and_grad_op>(logits, target, weight, pixel_weight, class_levels,
                                                          ignore_index, gradient, lambdas, alpha, reduction,
                                                          factor_normalization, factor_scope);
    const auto& [loss, factors, stats, table, grad] = results;
    if (compute_requires_grad(logits))
        set_history(loss, make_node<FusedBackward>(collect_next_edges(logits),
                                                   Pixels(logits, target, weight, pixel_weight, class_levels,
                                                          ignore_index, gradient, std::nullopt),
                                                   table, grad));
    return results;
}

Tensor gradient_autograd(const Tensor& logits, const Tensor& table, const Tensor& target,
                         const OptionalTensor& weight, const OptionalTensor& pixel_weight,
                         at::IntArrayRef class_levels, int64_t ignore_index, std::string_view gradient,
                         std::optional<bool> align_corners) {
    check_constant("weight", weight);
    check_constant("pixel_weight", pixel_weight);
    check_no_tangent(logits, table);
    return as_derivative(
        below_autograd<reduce_backward_op>(logits, table, target, weight, pixel_weight, class_levels,
                                           ignore_index, gradient, align_corners),
        logits, table);
}

Tensor table_autograd(const Tensor& stats, const Tensor& grad_loss, at::ArrayRef<double> lambdas,
                      double alpha, std::string_view reduction, std::string_view factor_normalization,
                      std::string_view factor_scope) {
    check_no_tangent(stats, grad_loss);
    return as_derivative(below_autograd<combine_backward_op>(stats, grad_loss, lambdas, alpha, reduction,
                                                             factor_normalization, factor_scope),
                         stats, grad_loss);
}

// An operator that writes a derivative over its first argument, made of that and the next two.
template <auto& op, typename Handle = std::decay_t<decltype(op())>>
struct Overwriting;

template <auto& op, typename... Rest>
struct Overwriting<op, c10::TypedOperatorHandle<void(const Tensor&, const Tensor&, const Tensor&, Rest...)>> {
    static void call(const Tensor& written, const Tensor& a, const Tensor& b, Rest... rest) {
        using namespace torch::autograd;
        check_no_tangent(written, a, b);
        const bool differentiable = compute_requires_grad(written, a, b);
        check_inplace(written, differentiable);
        {
            const at::AutoDispatchBelowAutograd guard;
            op().call(written, a, b, rest...);
        }
        if (differentiable)
            rebase_history(written, make_node<DerivativeBackward>(collect_next_edges(written, a, b)));
    }
};

// What was saved for the backward of another operator, or twice of this one, must not be read after this.
void gradient_inplace_bump(const Tensor& logits, const Tensor& table, const Tensor& target,
                           const OptionalTensor& weight, const OptionalTensor& pixel_weight,
                           at::IntArrayRef class_levels, int64_t ignore_index, std::string_view gradient) {
    below_autograd<reduce_backward__op>(logits, table, target, weight, pixel_weight, class_levels,
                                        ignore_index, gradient);
    torch::autograd::increment_version(logits);
}

}  // namespace

// reduce: stats (N, g, 5) of Double, per image and level S, P2, Q2, pixels and weight. Where
//   align_corners is given, the logits are upsampled to the target's size. `gradient` and `inplace` say how
//   it is differentiated.
// reduce_backward: dL/dlogits from grad_stats = dL/dstats; reduce_backward_ writes it over the logits.
// combine: the loss, () or (N,), in `dtype`, and the factors f_t (N or 1, g - 1) of Double.
// combine_backward: dL/dstats from the incoming gradient of the loss.
// loss_and_grad: reduce, combine, and for an incoming gradient of 1 their backwards, in one launch: loss,
//   factors, stats, grad_stats and dL/dlogits. rescale_ makes that the gradient for grad_loss. fits_on_chip:
//   whether one launch will be faster.
TORCH_LIBRARY_FRAGMENT(IAL_LIBRARY, m) {
    // Whatever strides the compiler finds best: it would otherwise copy the channels_last logits of its
    // convolutions.
    const std::vector<at::Tag> any_layout{at::Tag::flexible_layout};
    m.def(
        "reduce(Tensor logits, Tensor target, Tensor? weight, Tensor? pixel_weight, int[] class_levels, "
        "int ignore_index, str gradient, bool inplace, bool? align_corners=None) -> Tensor",
        any_layout);
    m.def(
        "reduce_backward(Tensor logits, Tensor grad_stats, Tensor target, Tensor? weight, "
        "Tensor? pixel_weight, int[] class_levels, int ignore_index, str gradient, bool? align_corners=None) "
        "-> Tensor",
        any_layout);
    m.def(
        "reduce_backward_(Tensor(a!) logits, Tensor grad_stats, Tensor target, Tensor? weight, "
        "Tensor? pixel_weight, int[] class_levels, int ignore_index, str gradient) -> ()");
    m.def(
        "combine(Tensor stats, float[] lambdas, float alpha, str reduction, str factor_normalization, "
        "str factor_scope, ScalarType dtype) -> (Tensor, Tensor)");
    m.def(
        "combine_backward(Tensor stats, Tensor grad_loss, float[] lambdas, float alpha, str reduction, "
        "str factor_normalization, str factor_scope) -> Tensor");
    m.def(
        "loss_and_grad(Tensor logits, Tensor target, Tensor? weight, Tensor? pixel_weight, int[] "
        "class_levels, "
        "int ignore_index, str gradient, float[] lambdas, float alpha, str reduction, "
        "str factor_normalization, str factor_scope) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "rescale_(Tensor(a!) grad, Tensor grad_loss, Tensor logits, Tensor grad_stats, Tensor target, "
        "Tensor? weight, Tensor? pixel_weight, int[] class_levels, int ignore_index, str gradient) -> ()");
    m.def(
        "fits_on_chip(Tensor logits, Tensor target, Tensor? pixel_weight, int levels, str factor_scope) -> "
        "bool");
}

TORCH_LIBRARY_IMPL(IAL_LIBRARY, Autograd, m) {
    m.impl("reduce", reduce_autograd);
    m.impl("reduce_backward", gradient_autograd);
    m.impl("combine", combine_autograd);
    m.impl("combine_backward", table_autograd);
    m.impl("loss_and_grad", fused_autograd);
    m.impl("reduce_backward_", Overwriting<reduce_backward__op>::call);
    m.impl("rescale_", Overwriting<rescale__op>::call);
}

TORCH_LIBRARY_IMPL(IAL_LIBRARY, ADInplaceOrView, m) { m.impl("reduce_backward_", gradient_inplace_bump); }

}  // namespace ial

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() = "The compiled operators of ial_cuda, reached through torch.ops.ial_cuda.";
    m.def(
        "build_info",
        [] {
            pybind11::dict info;
            info["torch"] = TORCH_VERSION;
            info["compiler"] = __VERSION__;
            info["cpu"] = ial::cpu_instruction_set();
            info["threads"] = ial::loop_threads();
            return info;
        },
        "What the extension was built with, and the instruction set and threads of its CPU kernels here.");
    m.def("release_gradient_memory", ial::release_gradient);
    m.def("keep_gradient_memory", ial::keep_gradient);
}
