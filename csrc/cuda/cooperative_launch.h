// The cooperative launch of the whole loss and its gradient.
// Chooses the images of a wave, the blocks of an image, and the tiles in shared memory.
#pragma once

#include "cooperative.cuh"
#include "one_pass_launch.h"

namespace ial::gpu {

// The largest number of levels for which the cooperative kernel has room for logits beside its sums.
constexpr int kMaxCooperativeLevels = 8;

// The memory that logits may occupy between their first and their second use. Registers are not counted. They
// compensate for the other data in shared memory.
template <typename Launcher>
int64_t on_chip_bytes(const Launcher& launcher) {
    return int64_t(launcher.multiprocessors()) * launcher.shared_bytes() + launcher.l2_bytes();
}

// The minimum shared memory of the cooperative kernel, for the tile with the most threads.
inline size_t min_cooperative_bytes(int64_t classes, int levels, int64_t pooled_images) {
    return CooperativeShared<Tile<float, 4, 11>>(classes, levels, pooled_images, 0).end;
}

template <typename T, typename Launcher>
struct CooperativeLaunch {
    using A = typename Arithmetic<T>::A;

    const Launcher& launcher;
    Call<T>& call;
    const CombineArguments& combine_arguments;
    const OptionalTensor& expected;
    const TrainingResults& to;
    const CombineResults& results;

    template <typename Tile>
    void run() const {
        constexpr int threads = kCooperativeThreads<Tile>;
        Problem<T>& problem = call.problem;
        const Layout& layout = problem.layout;
        const int64_t span = int64_t(threads) * Tile::V, useful = divide_up(layout.pixels, span);
        const int64_t wave = images_of_a_wave(threads);
        problem.blocks = static_cast<int>(std::clamp<int64_t>(launcher.multiprocessors() / wave, 1, useful));
        const CooperativeShared<Tile> least(layout.classes, problem.levels, wave, 0);
        const CooperativeShared<Tile> with_one(layout.classes, problem.levels, wave, 1);
        const size_t room = launcher.shared_bytes(), slot = with_one.end - least.end;
        const int64_t iterations = divide_up(layout.pixels, problem.blocks * span);

        Cooperative<T> cooperative{};
        cooperative.saved = std::min<int64_t>((room - least.end) / slot, iterations - 1);
        const Combine& combine = cooperative.combine = combine_arguments.combine;
        cooperative.stats = to.stats.template mutable_data_ptr<double>();
        cooperative.grad_stats = to.grad_stats.template mutable_data_ptr<double>();
        cooperative.results = results.template pointers<A>();
        cooperative.wave = wave;
        cooperative.exact = call.arguments.inputs.exact();
        cooperative.computed_for = make_computed_for(expected, to.computed_for);
        cooperative.grad = static_cast<T*>(to.grad.mutable_data_ptr());
        const int64_t grid = wave * problem.blocks;
        const Tensor partial = at::empty({2 * grid * problem.levels * kStats}, to.stats.options());
        cooperative.partial = partial.template mutable_data_ptr<double>();
        Tensor weight;
        if (wave < layout.batch && combine.reduction == Reduction::kMean && !combine.divisor) {
            weight = launch_weights<T>(launcher, call.arguments);
            cooperative.weights = static_cast<int>(weight.numel());
            cooperative.weight = weight.template const_data_ptr<double>();
        }
        const CooperativeShared<Tile> shared(layout.classes, problem.levels, wave, cooperative.saved);
        launcher.cooperate(cooperative_kernel<Tile>, dim3(grid), threads, shared.end, problem, cooperative,
                           combine_arguments.lambdas);
    }

    // Pooled images form one wave. Otherwise, waves have about equal sizes, and a wave's logits stay on the
    // chip (in shared memory, registers and L2) between their first and their second use.
    int64_t images_of_a_wave(int threads) const {
        const int64_t batch = call.problem.layout.batch;
        if (combine_arguments.combine.pool_batch) return batch;
        const int64_t bytes = to.grad.numel() * static_cast<int64_t>(sizeof(T));
        const int64_t waves = std::clamp<int64_t>(divide_up(bytes, on_chip_bytes(launcher)), 1, batch);
        // stats and grad_stats reuse the memory of one level's thread sums.
        const int64_t most = std::min<int64_t>(launcher.multiprocessors(), threads * sizeof(A) / 16);
        return std::min(divide_up(batch, waves), most);
    }
};

}  // namespace ial::gpu
