// The launches of one pass: first the weight of the labels, then loss and gradient.
#pragma once

#include "launch.h"
#include "one_pass.cuh"

namespace ial::gpu {

// The weight of the batch's valid pixels, in parts that add up to it.
template <typename T, typename Launcher>
Tensor launch_weights(const Launcher& launcher, const Arguments<T>& arguments) {
    constexpr int kLanes = 8;
    const Inputs& in = arguments.inputs;
    at::DimVector shape(in.target.sizes());
    shape.insert(shape.begin() + 1, in.logits.size(1));
    // The layout needs a tensor of full size with a class dimension. Coarse logits are smaller, so the labels
    // are expanded.
    const Tensor labels = in.target.unsqueeze(1).expand(shape);
    Problem<T> problem{};
    arguments.fill(problem);
    problem.layout = Inputs{labels,          in.target,       in.weight,   in.pixel_weight,
                            in.class_levels, in.ignore_index, in.gradient, in.label_smoothing}
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

// The arguments of one pass for any kernel. The kernel writes to `divisor` what the loss is divided by.
template <typename T>
class OnePassArguments {
 public:
    template <typename Launcher>
    OnePassArguments(const Launcher& launcher, const Arguments<T>& arguments, const Combine& combine,
                     const OptionalTensor& expected, const TrainingResults& to, const Tensor& divisor)
        : stats_(to.stats) {
        if (combine.divisor) {
            pass_.divisor = combine.divisor;
            pass_.parts = 1;
        } else if (combine.reduction == Reduction::kMean) {
            weights_ = launch_weights<T>(launcher, arguments);
            pass_.divisor = weights_.template const_data_ptr<double>();
            pass_.parts = static_cast<int>(weights_.numel());
        }
        pass_.exact = arguments.inputs.exact();
        pass_.computed_for = make_computed_for(expected, to.computed_for);
        pass_.grad_stats = to.grad_stats.template mutable_data_ptr<double>();
        pass_.whole_divisor = divisor.template mutable_data_ptr<double>();
        pass_.grad = static_cast<T*>(to.grad.mutable_data_ptr());
    }

    // Calls launch(pass) for a kernel with `blocks` blocks per image, and adds up their partial sums.
    template <typename Launcher, typename Launch>
    void run(const Launcher& launcher, int blocks, const Launch& launch) const {
        const Tensor partial = at::empty({stats_.numel() * blocks}, stats_.options());
        OnePass<T> pass = pass_;
        pass.partial = partial.template mutable_data_ptr<double>();
        launch(pass);
        launch_sums(launcher, partial, blocks, stats_);
    }

 private:
    const Tensor& stats_;
    Tensor weights_;
    OnePass<T> pass_{};
};

template <typename T, typename Launcher>
struct OnePassLaunch {
    using A = typename Arithmetic<T>::A;

    const Launcher& launcher;
    Call<T>& call;
    const OnePassArguments<T>& arguments;

    template <typename Tile>
    void run() const {
        Problem<T>& problem = call.problem;
        const int64_t images = problem.layout.batch;
        const size_t shared = call.staged_bytes() + problem.layout.classes * sizeof(BackwardClass<A>) +
                              OneLevelSums<A, kThreads>::kBytes;
        const auto kernel = one_pass_kernel<Tile>;
        problem.blocks = choose_blocks(launcher, kernel, shared, images, call.template threads<Tile>());
        arguments.run(launcher, problem.blocks, [&](const OnePass<T>& pass) {
            launcher(kernel, dim3(images * problem.blocks), kThreads, shared, problem, pass);
        });
    }
};

}  // namespace ial::gpu
