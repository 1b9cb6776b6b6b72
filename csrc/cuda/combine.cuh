// combine and its backward: the loss from the sums of all images, and grad_stats = dL/dstats.
// One block, with one thread per image.
#pragma once

#include "backward.cuh"

namespace ial::gpu {

struct Lambdas {
    double value[kMaxLevels - 1];
};

// The stats, copied to shared memory if they fit, because every thread reads them.
IAL_D const double* stage_stats(const Combine& c, bool fits) {
    extern __shared__ __align__(16) unsigned char ial_shared[];
    if (!fits) return c.stats;
    double* const stats = reinterpret_cast<double*>(ial_shared);
    for (int64_t i = threadIdx.x; i < c.batch * c.levels * kStats; i += blockDim.x) stats[i] = c.stats[i];
    __syncthreads();
    return stats;
}

// The results of combine. f: [N or 1, g - 1]; image_losses: [N]; loss: [N] or [1].
template <typename L>
struct Combined {
    double *f, *image_losses;
    L* loss;

    IAL_D void write(const Combine& c) const {
        if (c.pool_batch) {
            if (threadIdx.x == 0) factors(c, 0, c.batch, f);
            __syncthreads();
        }
        for (int64_t n = threadIdx.x; n < c.batch; n += blockDim.x) {
            double* const image_f = c.pool_batch ? f : f + n * (c.levels - 1);
            if (!c.pool_batch) factors(c, n, n + 1, image_f);
            image_losses[n] = image_loss(c, n, image_f);
            if (c.reduction == Reduction::kNone) loss[n] = static_cast<L>(image_losses[n]);
        }
        __syncthreads();
        if (c.reduction == Reduction::kNone || threadIdx.x > 0) return;
        double total = 0;
        for (int64_t n = 0; n < c.batch; ++n) total += image_losses[n];
        const double divisor = c.reduction == Reduction::kMean ? c.mean_divisor() : 1;
        *loss = static_cast<L>(divisor != 0 ? total / divisor : 0);
    }
};

// Each thread of the block writes the rows of its images.
template <typename Grads>
IAL_D void write_grad_stats(const Combine& c, const Grads& grad_loss, double weight, double* grad_stats) {
    if (!c.pool_batch)
        for (int64_t n = threadIdx.x; n < c.batch; n += blockDim.x)
            combine_backward(c, n, n + 1, grad_loss, weight, grad_stats);
    else if (threadIdx.x == 0)
        combine_backward(c, 0, c.batch, grad_loss, weight, grad_stats);
}

// An incoming gradient of 1. The actual one is not known yet.
struct UnitGradient {
    IAL_HD double operator[](int64_t) const { return 1; }
};

template <typename L>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Combine c, const __grid_constant__ Lambdas lambdas, bool fits, Combined<L> to) {
    c.lambdas = lambdas.value;
    c.stats = stage_stats(c, fits);
    to.write(c);
}

template <typename G>
__global__ void __launch_bounds__(kThreads)
    combine_backward_kernel(Combine c, const __grid_constant__ Lambdas lambdas, bool fits, const G* grad_loss,
                            double* grad_stats) {
    c.lambdas = lambdas.value;
    c.stats = stage_stats(c, fits);
    write_grad_stats(c, grad_loss, c.mean_divisor(), grad_stats);
}

}  // namespace ial::gpu
