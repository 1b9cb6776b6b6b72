// The launches of all kernels that depend on the type of the logits, so that each type's kernels can be
// compiled in a file of their own.
#pragma once

#include "cooperative_launch.h"
#include "upsample_launch.h"

namespace ial::gpu {

// T is the type of the kernels. The functions are defined outside of the class: that lets `extern template`
// suppress them.
template <typename T, typename Launcher>
struct Kernels {
    using A = typename Arithmetic<T>::A;

    static void reduce(const Launcher& launcher, const Inputs& inputs, const Tensor& stats);

    // With grad_loss, grad_stats and grad are those of an incoming gradient of 1.
    static void reduce_backward(const Launcher& launcher, const Inputs& inputs, const Tensor& grad_stats,
                                const OptionalTensor& grad_loss, bool exact, const Tensor& grad);

    // One level: writes all results but the loss.
    static void one_pass(const Launcher& launcher, const Inputs& inputs, Reduction reduction,
                         const OptionalTensor& divisor, const OptionalTensor& expected,
                         const OnePassResults& results);

    // Writes stats, grad_stats, grad and the results.
    static void loss_and_grad(const Launcher& launcher, const Inputs& inputs, const CombineArguments& combine,
                              bool exact, const Tensor& stats, const Tensor& grad_stats, const Tensor& grad,
                              const CombineResults& results);
};

template <typename T, typename Launcher>
void Kernels<T, Launcher>::reduce(const Launcher& launcher, const Inputs& inputs, const Tensor& stats) {
    if (inputs.align_corners) {
        UpsampledCall<T> call(inputs, inputs.logits);
        return call.with_chunk(ReduceUpsampled<T, Launcher>{launcher, call, stats});
    }
    Call<T> call(inputs, inputs.logits);
    call.with_tile(Reduce<T, Launcher>{launcher, call, stats});
}

template <typename T, typename Launcher>
void Kernels<T, Launcher>::reduce_backward(const Launcher& launcher, const Inputs& inputs,
                                           const Tensor& grad_stats, const OptionalTensor& grad_loss,
                                           bool exact, const Tensor& grad) {
    if (inputs.align_corners) {
        UpsampledCall<T> call(inputs, grad);
        return call.with_chunk(ReduceBackwardUpsampled<T, Launcher>{launcher, call, grad_stats, exact, grad});
    }
    Tensor incoming;
    if (grad_loss) incoming = grad_loss->to(c10::CppTypeToScalarType<A>::value).contiguous();
    Call<T> call(inputs, grad);
    call.with_tile(ReduceBackward<T, Launcher>{launcher, call, grad_stats,
                                               grad_loss ? incoming.template const_data_ptr<A>() : nullptr,
                                               exact, grad});
}

template <typename T, typename Launcher>
void Kernels<T, Launcher>::one_pass(const Launcher& launcher, const Inputs& inputs, Reduction reduction,
                                    const OptionalTensor& divisor, const OptionalTensor& expected,
                                    const OnePassResults& results) {
    OnePass<T> pass{};
    pass.expected = expected ? expected->const_data_ptr<double>() : nullptr;
    pass.exact = inputs.exact();
    pass.grad_stats = results.grad_stats.mutable_data_ptr<double>();
    pass.whole_divisor = results.divisor.mutable_data_ptr<double>();
    pass.computed_for = results.computed_for.mutable_data_ptr<double>();
    pass.grad = static_cast<T*>(results.grad.mutable_data_ptr());
    Call<T> call(inputs, results.grad);
    const Tensor parts = divisor_parts<T>(launcher, call.arguments, reduction, divisor);
    pass.divisor = parts.defined() ? parts.template const_data_ptr<double>() : nullptr;
    pass.parts = parts.defined() ? static_cast<int>(parts.numel()) : 0;
    call.with_tile(OnePassLaunch<T, Launcher>{launcher, call, pass, results.stats});
}

template <typename T, typename Launcher>
void Kernels<T, Launcher>::loss_and_grad(const Launcher& launcher, const Inputs& inputs,
                                         const CombineArguments& combine, bool exact, const Tensor& stats,
                                         const Tensor& grad_stats, const Tensor& grad,
                                         const CombineResults& results) {
    Call<T> call(inputs, grad);
    TORCH_INTERNAL_ASSERT(call.vectors);
    call.with_vectors(
        CooperativeLaunch<T, Launcher>{launcher, call, combine, exact, stats, grad_stats, grad, results});
}

}  // namespace ial::gpu
