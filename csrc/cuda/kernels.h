// The launches of all kernels that depend on the type of the logits.
// Each type's kernels can be compiled in a file of their own.
#pragma once

#include "cooperative_launch.h"
#include "upsample_launch.h"

namespace ial::gpu {

// T is the kernels' type. The functions are defined outside the class, so that `extern template` can suppress
// them.
template <typename T, typename Launcher>
struct Kernels {
    using A = typename Arithmetic<T>::A;

    static void reduce(const Launcher& launcher, const Inputs& inputs, const Tensor& stats);

    // grad_stats as in reduce_backward_kernel.
    static void reduce_backward(const Launcher& launcher, const Inputs& inputs, const double* grad_stats,
                                const Incoming<A>& incoming, const Tensor& grad);

    static void pixel_nll(const Launcher& launcher, const Inputs& inputs, const Tensor& map);

    // One level. Writes `to`, and to `divisor` what the loss is divided by.
    static void one_pass(const Launcher& launcher, const Inputs& inputs, const Combine& combine,
                         const OptionalTensor& expected, const TrainingResults& to, const Tensor& divisor);

    // The whole loss and its gradient in one launch. Writes `to` and `results`.
    static void cooperate(const Launcher& launcher, const Inputs& inputs, const CombineArguments& combine,
                          const OptionalTensor& expected, const TrainingResults& to,
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
                                           const double* grad_stats, const Incoming<A>& incoming,
                                           const Tensor& grad) {
    const bool exact = inputs.exact();
    if (inputs.align_corners) {
        UpsampledCall<T> call(inputs, grad);
        return call.with_chunk(
            ReduceBackwardUpsampled<T, Launcher>{launcher, call, grad_stats, incoming, exact, grad});
    }
    Call<T> call(inputs, grad);
    call.with_tile(ReduceBackward<T, Launcher>{launcher, call, grad_stats, incoming, exact, grad});
}

template <typename T, typename Launcher>
void Kernels<T, Launcher>::pixel_nll(const Launcher& launcher, const Inputs& inputs, const Tensor& map) {
    if (inputs.align_corners) {
        UpsampledCall<T> call(inputs, inputs.logits);
        return call.with_chunk(PixelNllUpsampled<T, Launcher>{launcher, call, map});
    }
    Call<T> call(inputs, inputs.logits);
    call.with_tile(PixelNll<T, Launcher>{launcher, call, map});
}

template <typename T, typename Launcher>
void Kernels<T, Launcher>::one_pass(const Launcher& launcher, const Inputs& inputs, const Combine& combine,
                                    const OptionalTensor& expected, const TrainingResults& to,
                                    const Tensor& divisor) {
    if (inputs.align_corners) {
        UpsampledCall<T> call(inputs, to.grad);
        const OnePassArguments<T> arguments(launcher, call.arguments, combine, expected, to, divisor);
        return call.with_chunk(OnePassUpsampled<T, Launcher>{launcher, call, arguments});
    }
    Call<T> call(inputs, to.grad);
    const OnePassArguments<T> arguments(launcher, call.arguments, combine, expected, to, divisor);
    call.with_tile(OnePassLaunch<T, Launcher>{launcher, call, arguments});
}

template <typename T, typename Launcher>
void Kernels<T, Launcher>::cooperate(const Launcher& launcher, const Inputs& inputs,
                                     const CombineArguments& combine, const OptionalTensor& expected,
                                     const TrainingResults& to, const CombineResults& results) {
    Call<T> call(inputs, to.grad);
    TORCH_INTERNAL_ASSERT(call.vectors);
    call.with_vectors(CooperativeLaunch<T, Launcher>{launcher, call, combine, expected, to, results});
}

}  // namespace ial::gpu
