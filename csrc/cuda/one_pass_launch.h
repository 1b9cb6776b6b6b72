// The launches of one pass: the weight of the labels, then loss and gradient.
#pragma once

#include <ATen/ops/empty_like.h>

#include "launch.h"
#include "one_pass.cuh"

namespace ial::gpu {

// The results of one pass, on the device. `divisor` is what the loss is divided by.
struct OnePassResults {
    Tensor stats, grad_stats, grad, divisor, computed_for;

    explicit OnePassResults(const Tensor& logits)
        : stats(at::empty({logits.size(0), 1, kStats}, logits.options().dtype(at::kDouble))),
          grad_stats(at::empty_like(stats)),
          grad(at::empty_like(logits)),
          divisor(at::empty({}, stats.options())),
          computed_for(at::empty_like(divisor)) {}
};

// The weight of the batch's valid pixels in parts, which add up to it.
template <typename T, typename Launcher>
Tensor launch_weights(const Launcher& launcher, const Arguments<T>& arguments) {
    constexpr int kLanes = 8;
    const Inputs& in = arguments.inputs;
    at::DimVector shape(in.target.sizes());
    shape.insert(shape.begin() + 1, in.logits.size(1));
    // Of the logits' shape, with the labels' memory: coarse logits are smaller.
    const Tensor labels = in.target.unsqueeze(1).expand(shape);
    Problem<T> problem{};
    arguments.fill(problem);
    problem.layout =
        Inputs{labels, in.target, in.weight, in.pixel_weight, in.class_levels, in.ignore_index, in.gradient}
            .layout(labels);
    const Layout& layout = problem.layout;
    const int lanes = layout.row % kLanes == 0 ? kLanes : 1;
    problem.dense_labels = has_dense_labels(layout, problem.target, in.target.itemsize(), lanes);
    const int64_t blocks = std::clamp<int64_t>(
        divide_up(layout.batch * (layout.pixels / lanes), kWeightThreads), 1, launcher.multiprocessors());
    const Tensor parts = at::empty({blocks}, in.logits.options().dtype(at::kDouble));
    launcher(lanes == 1 ? weight_kernel<T, 1> : weight_kernel<T, kLanes>, dim3(blocks), kWeightThreads,
             kWeightThreads / kWarp * sizeof(double), problem, parts.template mutable_data_ptr<double>());
    return parts;
}

// What the loss is divided by: `given`, the weight of the valid pixels, or 1 (not defined) for a sum.
template <typename T, typename Launcher>
Tensor divisor_parts(const Launcher& launcher, const Arguments<T>& arguments, Reduction reduction,
                     const OptionalTensor& given) {
    if (reduction != Reduction::kMean) return {};
    return given ? *given : launch_weights<T>(launcher, arguments);
}

template <typename T, typename Launcher>
struct OnePassLaunch {
    using A = typename Arithmetic<T>::A;

    const Launcher& launcher;
    Call<T>& call;
    OnePass<T> pass;
    const Tensor& stats;

    template <typename Tile>
    void run() const {
        Problem<T>& problem = call.problem;
        const int64_t images = problem.layout.batch;
        const size_t shared = call.staged_bytes() + problem.layout.classes * sizeof(BackwardClass<A>) +
                              OneLevelSums<A, kThreads>::kBytes;
        const auto kernel = one_pass_kernel<Tile>;
        problem.blocks = choose_blocks(launcher, kernel, shared, images, call.template threads<Tile>());
        const Tensor partial = at::empty({images * kStats * problem.blocks}, stats.options());
        OnePass<T> with_sums = pass;
        with_sums.partial = partial.template mutable_data_ptr<double>();
        launcher(kernel, dim3(images * problem.blocks), kThreads, shared, problem, with_sums);
        launch_sums(launcher, partial, problem.blocks, stats);
    }
};

}  // namespace ial::gpu
