// The operators for all devices: schemas, autograd, and the Python module of the extension.
// The kernels of a device are registered in its folder, cpu/ or cuda/.
#include <ATen/TensorSubclassLikeUtils.h>
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

#include "cpu/gradient_memory.h"
#include "inputs.h"
#include "parallel.h"

// The name of the operator library. tests/simt compiles this file under another name, with other kernels.
#ifndef IAL_LIBRARY
#define IAL_LIBRARY ial_cuda
#endif

namespace ial {

const char* cpu_instruction_set();  // cpu/operators.cpp

namespace {

using namespace torch::autograd;

// -------------------------------------------------------------------------------------------------
// The operators as C++ functions. Each is looked up once.

#define IAL_OP(name, ...)                                                                      \
    inline auto& name##_op() {                                                                 \
        static auto handle = c10::Dispatcher::singleton()                                      \
                                 .findSchemaOrThrow(C10_STRINGIZE(IAL_LIBRARY) "::" #name, "") \
                                 .typed<__VA_ARGS__>();                                        \
        return handle;                                                                         \
    }

IAL_OP(reduce, Tensor(const Tensor&, IAL_PIXEL_PARAMETERS, bool, std::optional<bool>))
IAL_OP(reduce_backward, Tensor(const Tensor&, const Tensor&, IAL_PIXEL_PARAMETERS, std::optional<bool>))
IAL_OP(reduce_backward_, void(const Tensor&, const Tensor&, IAL_PIXEL_PARAMETERS))
IAL_OP(combine, std::tuple<Tensor, Tensor>(const Tensor&, IAL_COMBINE_PARAMETERS, at::ScalarType))
IAL_OP(combine_backward, Tensor(const Tensor&, const Tensor&, IAL_COMBINE_PARAMETERS))
IAL_OP(loss_and_grad, LossAndGrad(const Tensor&, IAL_PIXEL_PARAMETERS, IAL_COMBINE_PARAMETERS,
                                  std::optional<bool>, const OptionalTensor&, bool))
IAL_OP(rescale_, void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                      IAL_PIXEL_PARAMETERS, std::optional<bool>, const OptionalTensor&))
IAL_OP(pixel_nll, Tensor(const Tensor&, IAL_NLL_PARAMETERS))
IAL_OP(pixel_nll_backward, Tensor(const Tensor&, const Tensor&, IAL_NLL_PARAMETERS))
#undef IAL_OP

template <auto& op, typename... Args>
auto below_autograd(const Args&... args) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op().call(args...);
}

// -------------------------------------------------------------------------------------------------
// Arguments without derivatives.

template <typename... Tensors>
void check_no_tangent(const Tensors&... tensors) {
    TORCH_CHECK_NOT_IMPLEMENTED(!(isFwGradDefined(tensors) || ...),
                                "ial_cuda: forward-mode derivatives (jvp) are not implemented; "
                                "backend='reference' has them");
}

void check_constant(const char* name, const OptionalTensor& tensor) {
    check_no_tangent(tensor);
    TORCH_CHECK_VALUE(!compute_requires_grad(tensor), name,
                      " requires a gradient, expected a constant: only logits are differentiated");
}

void check_constant(const OptionalTensor& weight, const OptionalTensor& pixel_weight) {
    check_constant("weight", weight);
    check_constant("pixel_weight", pixel_weight);
}

// -------------------------------------------------------------------------------------------------
// Autograd nodes. torch.func rejects custom torch::autograd::Function classes, so we build the nodes here.

using NodePtr = decltype(Edge::function);  // std::shared_ptr in torch 2.11, intrusive later

template <typename T, typename Pointer = NodePtr, typename... Args>
NodePtr make_node(edge_list&& inputs, Args&&... args) {
    Pointer node;
    if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
        node.reset(new T(std::forward<Args>(args)...), [](auto* last) { deleteNode(last); });
    else
        node = c10::make_intrusive<T>(std::forward<Args>(args)...);
    node->set_next_edges(std::move(inputs));
    return node;
}

// The node of a gradient. Second derivatives are not implemented: requesting one raises an error instead of
// returning zero.
struct DerivativeBackward final : Node {
    variable_list apply(variable_list&&) override {
        TORCH_CHECK_NOT_IMPLEMENTED(
            false,
            "ial_cuda: double backward is not implemented; use backend=\"reference\" where gradients of "
            "gradients are needed");
    }
    std::string name() const override { return "DerivativeBackward"; }
};

// A node that computes the gradient of one input from the gradient of its first output.
struct GradientNode : Node {
    virtual Tensor differentiate(const Tensor& grad) = 0;
    virtual void release() = 0;

    variable_list apply(variable_list&& grads) final {
        const std::lock_guard<std::mutex> lock(mutex_);
        return {grads[0].defined() ? differentiate(grads[0]) : Tensor()};
    }
    void release_variables() final {
        const std::lock_guard<std::mutex> lock(mutex_);
        release();
    }
};

// Saved for reduce_backward: the arguments that it shares with reduce and loss_and_grad.
struct SavedInputs {
    SavedVariable logits, target, weight, pixel_weight;
    std::vector<int64_t> class_levels;
    int64_t ignore_index;
    std::string gradient;
    double label_smoothing;
    std::optional<bool> align_corners;

    SavedInputs(const Tensor& logits, IAL_PIXEL_PARAMETERS, std::optional<bool> align_corners)
        : logits(logits, false),
          target(target, false),
          weight(weight, false),
          pixel_weight(pixel_weight, false),
          class_levels(class_levels.vec()),
          ignore_index(ignore_index),
          gradient(gradient),
          label_smoothing(label_smoothing),
          align_corners(align_corners) {}

    // Calls f(logits, IAL_PIXEL_ARGUMENTS).
    template <typename F>
    auto unpack(const F& f) const {
        const auto optional = [](const Tensor& tensor) {
            return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
        };
        return f(logits.unpack(), target.unpack(), optional(weight.unpack()), optional(pixel_weight.unpack()),
                 class_levels, ignore_index, gradient, label_smoothing);
    }

    Tensor reduce_backward(const Tensor& grad_stats) const {
        return unpack([&](const Tensor& x, const auto&... rest) {
            return reduce_backward_op().call(x, grad_stats, rest..., align_corners);
        });
    }

    void release() {
        for (SavedVariable* saved : {&logits, &target, &weight, &pixel_weight}) saved->reset_data();
    }
};

struct ReduceBackward final : GradientNode {
    SavedInputs inputs;
    bool inplace;

    ReduceBackward(SavedInputs&& inputs, bool inplace) : inputs(std::move(inputs)), inplace(inplace) {}

    Tensor differentiate(const Tensor& grad) override {
        const Tensor grad_stats = grad.contiguous();
        // With create_graph=True, autograd still needs the logits, so they are not overwritten.
        if (!inplace || at::GradMode::is_enabled()) return inputs.reduce_backward(grad_stats);
        return inputs.unpack([&](const Tensor& x, const auto&... rest) {
            reduce_backward__op().call(x, grad_stats, rest...);
            return x.detach();
        });
    }
    void release() override { inputs.release(); }
    std::string name() const override { return "ImportanceAwareLossReduceBackward"; }
};

// Saved for combine_backward: the arguments that it shares with combine and loss_and_grad.
struct SavedCombine {
    SavedVariable stats, divisor;
    std::vector<double> lambdas;
    double alpha;
    std::string reduction, factor_normalization, factor_scope;

    SavedCombine(const Tensor& stats, IAL_COMBINE_PARAMETERS)
        : stats(stats, false),
          divisor(divisor, false),
          lambdas(lambdas.vec()),
          alpha(alpha),
          reduction(reduction),
          factor_normalization(factor_normalization),
          factor_scope(factor_scope) {}

    Tensor combine_backward(const Tensor& grad_loss) const {
        const Tensor given = divisor.unpack();
        return combine_backward_op().call(stats.unpack(), grad_loss,
                                          given.defined() ? OptionalTensor(given) : std::nullopt, lambdas,
                                          alpha, reduction, factor_normalization, factor_scope);
    }

    void release() {
        for (SavedVariable* saved : {&stats, &divisor}) saved->reset_data();
    }
};

struct CombineBackward final : GradientNode {
    SavedCombine combine;

    explicit CombineBackward(SavedCombine&& combine) : combine(std::move(combine)) {}

    Tensor differentiate(const Tensor& grad_loss) override { return combine.combine_backward(grad_loss); }
    void release() override { combine.release(); }
    std::string name() const override { return "ImportanceAwareLossCombineBackward"; }
};

// The node of loss_and_grad if the gradient was left to the backward pass.
struct TwoPassBackward final : GradientNode {
    SavedInputs inputs;
    SavedCombine combine;

    TwoPassBackward(SavedInputs&& inputs, SavedCombine&& combine)
        : inputs(std::move(inputs)), combine(std::move(combine)) {}

    Tensor differentiate(const Tensor& grad_loss) override {
        return inputs.reduce_backward(combine.combine_backward(grad_loss));
    }
    void release() override {
        inputs.release();
        combine.release();
    }
    std::string name() const override { return "ImportanceAwareLossBackward"; }
};

// The node of loss_and_grad if the gradient was computed with the loss, for the incoming gradient
// `computed_for`. The first backward pass returns that gradient. If another incoming gradient arrives,
// rescale_ recomputes it first. A second backward pass, or one with create_graph=True, computes a new
// gradient.
struct LossAndGradBackward final : GradientNode {
    SavedInputs inputs;
    SavedVariable grad_stats, computed, computed_for;
    OptionalTensor expected;
    bool handed_out = false;

    LossAndGradBackward(SavedInputs&& inputs, const LossAndGrad& results, const OptionalTensor& expected)
        : inputs(std::move(inputs)),
          grad_stats(std::get<3>(results), false),
          computed(std::get<4>(results), false),
          computed_for(std::get<5>(results), false),
          expected(expected) {}

    Tensor differentiate(const Tensor& grad_loss) override {
        const Tensor unit_grad_stats = grad_stats.unpack();  // for an incoming gradient of 1
        // Compute a new gradient if calls are traced, or if vmap turns one call into several: nothing may be
        // overwritten then.
        if (handed_out || at::GradMode::is_enabled() || at::isTensorSubclassLike(grad_loss))
            return inputs.reduce_backward(
                at::where(unit_grad_stats == 0, unit_grad_stats, unit_grad_stats * grad_loss));
        const Tensor grad = computed.unpack(), made_for = computed_for.unpack();
        handed_out = true;
        computed.reset_data();
        inputs.unpack([&](const Tensor& x, const auto&... rest) {
            rescale__op().call(grad, grad_loss, made_for, x, unit_grad_stats, rest..., inputs.align_corners,
                               expected);
        });
        return grad;
    }
    void release() override {
        inputs.release();
        for (SavedVariable* saved : {&grad_stats, &computed, &computed_for}) saved->reset_data();
        expected.reset();
    }
    std::string name() const override { return "ImportanceAwareLossBackward"; }
};

struct PixelNllBackward final : GradientNode {
    SavedInputs inputs;

    explicit PixelNllBackward(SavedInputs&& inputs) : inputs(std::move(inputs)) {}

    Tensor differentiate(const Tensor& grad_nll) override {
        return inputs.unpack([&](const Tensor& x, const Tensor& target, const OptionalTensor& weight,
                                 const auto&, const auto&, int64_t ignore_index, const auto&,
                                 double label_smoothing) {
            return pixel_nll_backward_op().call(x, grad_nll, target, weight, ignore_index, label_smoothing,
                                                inputs.align_corners);
        });
    }
    void release() override { inputs.release(); }
    std::string name() const override { return "PixelNllBackward"; }
};

// -------------------------------------------------------------------------------------------------
// The autograd implementations of the operators.

Tensor reduce_autograd(const Tensor& logits, IAL_PIXEL_PARAMETERS, bool inplace,
                       std::optional<bool> align_corners) {
    check_constant(weight, pixel_weight);
    check_no_tangent(logits);
    const bool differentiable = compute_requires_grad(logits);
    if (inplace) check_inplace(logits, differentiable);
    const Tensor stats = below_autograd<reduce_op>(logits, IAL_PIXEL_ARGUMENTS, inplace, align_corners);
    if (differentiable)
        set_history(stats, make_node<ReduceBackward>(collect_next_edges(logits),
                                                     SavedInputs(logits, IAL_PIXEL_ARGUMENTS, align_corners),
                                                     inplace));
    return stats;
}

std::tuple<Tensor, Tensor> combine_autograd(const Tensor& stats, IAL_COMBINE_PARAMETERS,
                                            at::ScalarType dtype) {
    check_constant("divisor", divisor);
    check_no_tangent(stats);
    const auto [loss, factors] = below_autograd<combine_op>(stats, IAL_COMBINE_ARGUMENTS, dtype);
    if (compute_requires_grad(stats))
        set_history(loss, make_node<CombineBackward>(collect_next_edges(stats),
                                                     SavedCombine(stats, IAL_COMBINE_ARGUMENTS)));
    return {loss, factors};
}

LossAndGrad loss_and_grad_autograd(const Tensor& logits, IAL_PIXEL_PARAMETERS, IAL_COMBINE_PARAMETERS,
                                   std::optional<bool> align_corners, const OptionalTensor& expected,
                                   bool one_launch) {
    check_constant(weight, pixel_weight);
    check_constant("divisor", divisor);
    check_no_tangent(logits);
    const LossAndGrad results = below_autograd<loss_and_grad_op>(
        logits, IAL_PIXEL_ARGUMENTS, IAL_COMBINE_ARGUMENTS, align_corners, expected, one_launch);
    if (compute_requires_grad(logits)) {
        const auto& [loss, factors, stats, grad_stats, grad, computed_for] = results;
        SavedInputs inputs(logits, IAL_PIXEL_ARGUMENTS, align_corners);
        edge_list edges = collect_next_edges(logits);
        set_history(
            loss, has_grad(results)
                      ? make_node<LossAndGradBackward>(std::move(edges), std::move(inputs), results, expected)
                      : make_node<TwoPassBackward>(std::move(edges), std::move(inputs),
                                                   SavedCombine(stats, IAL_COMBINE_ARGUMENTS)));
    }
    return results;
}

Tensor as_derivative(const Tensor& result, const Tensor& logits_or_stats, const Tensor& incoming) {
    if (compute_requires_grad(logits_or_stats, incoming))
        set_history(result, make_node<DerivativeBackward>(collect_next_edges(logits_or_stats, incoming)));
    return result;
}

Tensor reduce_backward_autograd(const Tensor& logits, const Tensor& grad_stats, IAL_PIXEL_PARAMETERS,
                                std::optional<bool> align_corners) {
    check_constant(weight, pixel_weight);
    check_no_tangent(logits, grad_stats);
    return as_derivative(
        below_autograd<reduce_backward_op>(logits, grad_stats, IAL_PIXEL_ARGUMENTS, align_corners), logits,
        grad_stats);
}

Tensor combine_backward_autograd(const Tensor& stats, const Tensor& grad_loss, IAL_COMBINE_PARAMETERS) {
    check_constant("divisor", divisor);
    check_no_tangent(stats, grad_loss);
    return as_derivative(below_autograd<combine_backward_op>(stats, grad_loss, IAL_COMBINE_ARGUMENTS), stats,
                         grad_loss);
}

Tensor pixel_nll_autograd(const Tensor& logits, IAL_NLL_PARAMETERS) {
    check_constant("weight", weight);
    check_no_tangent(logits);
    const Tensor nll = below_autograd<pixel_nll_op>(logits, IAL_NLL_ARGUMENTS);
    if (compute_requires_grad(logits))
        set_history(nll, make_node<PixelNllBackward>(
                             collect_next_edges(logits),
                             SavedInputs(logits, target, weight, std::nullopt, {}, ignore_index, "exact",
                                         label_smoothing, align_corners)));
    return nll;
}

Tensor pixel_nll_backward_autograd(const Tensor& logits, const Tensor& grad_nll, IAL_NLL_PARAMETERS) {
    check_constant("weight", weight);
    check_no_tangent(logits, grad_nll);
    return as_derivative(below_autograd<pixel_nll_backward_op>(logits, grad_nll, IAL_NLL_ARGUMENTS), logits,
                         grad_nll);
}

// The autograd implementation of an operator that overwrites its first argument with a gradient computed from
// all its tensors.
template <auto& op, typename Handle = std::decay_t<decltype(op())>>
struct Overwriting;

template <auto& op, typename... Args>
struct Overwriting<op, c10::TypedOperatorHandle<void(const Tensor&, Args...)>> {
    static void call(const Tensor& written, Args... args) {
        variable_list tensors{written};
        const auto collect = [&](const auto& argument) {
            if constexpr (std::is_same_v<decltype(argument), const Tensor&>) tensors.push_back(argument);
        };
        (collect(args), ...);
        for (const Tensor& tensor : tensors) check_no_tangent(tensor);
        const bool differentiable = compute_requires_grad(tensors);
        check_inplace(written, differentiable);
        {
            const at::AutoDispatchBelowAutograd guard;
            op().call(written, args...);
        }
        if (differentiable)
            rebase_history(written, make_node<DerivativeBackward>(collect_next_edges(tensors)));
    }
};

// Bumping the version makes torch reject any later backward pass that saved these logits: that of another
// operator, or a second one of this operator.
void reduce_backward_bump_version(const Tensor& logits, const Tensor& grad_stats, IAL_PIXEL_PARAMETERS) {
    below_autograd<reduce_backward__op>(logits, grad_stats, IAL_PIXEL_ARGUMENTS);
    increment_version(logits);
}

}  // namespace

// -------------------------------------------------------------------------------------------------
// Registration

// reduce            stats (N, g, 5) of Double: S, P2, Q2, pixels and weight of each image and level. With
//                   align_corners set, the logits are upsampled to the size of the target. `gradient` and
//                   `inplace` are for the backward pass.
// reduce_backward   dL/dlogits, from grad_stats = dL/dstats. reduce_backward_ writes it over the logits.
// combine           The loss, () or (N,) of `dtype`, and the factors f_t, (N or 1, g - 1) of Double. A
//                   divisor of Double replaces the weight of the valid pixels.
// combine_backward  dL/dstats, from the incoming gradient of the loss.
// loss_and_grad     For training. Returns loss, factors and stats. If that saves a pass over the logits, it
//                   also returns grad_stats for an incoming gradient of 1, dL/dlogits for an incoming
//                   gradient of computed_for, and computed_for, () of Double. Otherwise these three are
//                   empty, (0,), and the backward pass computes the gradient. With one level, one pass
//                   computes everything, and P2 and Q2 are 0. `expected`, (2,) of Double, holds computed_for
//                   (1 without it) and the last incoming gradient. `one_launch` says whether several levels
//                   are computed in one cooperative launch where that is possible.
// rescale_          Turns that dL/dlogits into the gradient for grad_loss. If the last two incoming gradients
//                   are equal, they become the expected one.
// pixel_nll         -log pi of each pixel, weighted and smoothed, in the shape of the target. It is 0 for
// void
//                   pixels.
// pixel_nll_backward
//                   dL/dlogits, from grad_nll = dL/dpixel_nll.
TORCH_LIBRARY_FRAGMENT(IAL_LIBRARY, m) {
    // Lets the compiler choose the strides. Otherwise it copies the channels_last logits of its convolutions.
    const std::vector<at::Tag> any_layout{at::Tag::flexible_layout};
    m.def(
        "reduce(Tensor logits, Tensor target, Tensor? weight, Tensor? pixel_weight, int[] class_levels, "
        "int ignore_index, str gradient, float label_smoothing, bool inplace, bool? align_corners=None) -> "
        "Tensor",
        any_layout);
    m.def(
        "reduce_backward(Tensor logits, Tensor grad_stats, Tensor target, Tensor? weight, "
        "Tensor? pixel_weight, int[] class_levels, int ignore_index, str gradient, float label_smoothing, "
        "bool? align_corners=None) -> Tensor",
        any_layout);
    m.def(
        "reduce_backward_(Tensor(a!) logits, Tensor grad_stats, Tensor target, Tensor? weight, "
        "Tensor? pixel_weight, int[] class_levels, int ignore_index, str gradient, float label_smoothing) -> "
        "()");
    m.def(
        "combine(Tensor stats, Tensor? divisor, float[] lambdas, float alpha, str reduction, "
        "str factor_normalization, str factor_scope, ScalarType dtype) -> (Tensor, Tensor)");
    m.def(
        "combine_backward(Tensor stats, Tensor grad_loss, Tensor? divisor, float[] lambdas, float alpha, "
        "str reduction, str factor_normalization, str factor_scope) -> Tensor");
    m.def(
        "loss_and_grad(Tensor logits, Tensor target, Tensor? weight, Tensor? pixel_weight, "
        "int[] class_levels, int ignore_index, str gradient, float label_smoothing, Tensor? divisor, "
        "float[] lambdas, float alpha, str reduction, str factor_normalization, str factor_scope, "
        "bool? align_corners=None, Tensor? expected=None, bool one_launch=False) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "rescale_(Tensor(a!) grad, Tensor grad_loss, Tensor computed_for, Tensor logits, Tensor grad_stats, "
        "Tensor target, Tensor? weight, Tensor? pixel_weight, int[] class_levels, int ignore_index, "
        "str gradient, float label_smoothing, bool? align_corners=None, Tensor(b!)? expected=None) -> ()");
    m.def(
        "pixel_nll(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
        "bool? align_corners=None) -> Tensor",
        any_layout);
    m.def(
        "pixel_nll_backward(Tensor logits, Tensor grad_nll, Tensor target, Tensor? weight, int ignore_index, "
        "float label_smoothing, bool? align_corners=None) -> Tensor",
        any_layout);
}

TORCH_LIBRARY_IMPL(IAL_LIBRARY, Autograd, m) {
    m.impl("reduce", reduce_autograd);
    m.impl("reduce_backward", reduce_backward_autograd);
    m.impl("combine", combine_autograd);
    m.impl("combine_backward", combine_backward_autograd);
    m.impl("loss_and_grad", loss_and_grad_autograd);
    m.impl("pixel_nll", pixel_nll_autograd);
    m.impl("pixel_nll_backward", pixel_nll_backward_autograd);
    m.impl("reduce_backward_", Overwriting<reduce_backward__op>::call);
    m.impl("rescale_", Overwriting<rescale__op>::call);
}

TORCH_LIBRARY_IMPL(IAL_LIBRARY, ADInplaceOrView, m) {
    m.impl("reduce_backward_", reduce_backward_bump_version);
}

}  // namespace ial

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() = "The compiled operators of ial_cuda, called through torch.ops.ial_cuda.";
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
        "How the extension was built, and the instruction set and threads of its CPU kernels on this "
        "machine.");
    m.def("release_gradient_memory", ial::release_gradient);
    m.def("keep_gradient_memory", ial::keep_gradient);
}
