// The mathematics of the Importance-Aware Loss (Chen, Gong, Yang, IJCAI 2017), for host and device.
// This header includes neither torch nor CUDA.
//
//   reduce            stats[N, g, 5]: five sums per image n and level k, from one read of the logits
//   combine           stats -> the factors f_t and the loss                                (Eqs. 3-8)
//   combine_backward  grad_stats = dL/dstats[N, g, 5], from stats and the incoming gradient
//   reduce_backward   the gradient of the logits, from one read of them and one write      (Eqs. 9-19)
//
// The loss depends on the logits through `stats` alone. The gradient of a pixel therefore needs only one row
// of grad_stats from the rest of the batch: that of its level. The kernels that read logits know nothing of
// alpha, lambda, the normalisations, the reduction and the incoming gradient.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace ial {

// The five sums of a level. S is w'l of Eqs. 1 and 2. P2 and Q2 sum the two values of (pi - M_t)^2 in Eq. 3:
// pi^2 and (1 - pi)^2. The last two are the number of pixels and the sum of their weights. Their derivatives
// are 0.
enum Stat : int { kS, kP2, kQ2, kCount, kWeight, kStats };

enum class Reduction : int { kMean, kSum, kNone };

// -------------------------------------------------------------------------------------------------
// One pixel. Its gradient is  dL/dX_c = scale p_c + [c = y] extra.
//
// `ce` = w dL/dS comes from the cross-entropy. `factor_term` = pi dL/dpi = 2 pi (pi dL/dP2 - (1 - pi) dL/dQ2)
// comes from the factors. It is A of Eq. 16 times its multiplier in Eqs. 10-13.
//   exact   dL/dX_c = (p_c - [c=y]) (ce - factor_term)
//   paper   dL/dX_c = (p_c - [c=y]) ce + [c=y] (1 - pi) factor_term      Eq. 15: dpi/dX_c is 0 for c != y
// `cross` is 1 for the exact gradient, which includes dpi/dX_c for c != y, and 0 for the paper's.

template <typename T>
struct PixelGradient {
    T scale, extra;

    IAL_HD PixelGradient(T ce, T dp2, T dq2, T pi, T cross) {
        const T factor_term = T(2) * pi * (pi * dp2 - (T(1) - pi) * dq2);
        scale = ce - cross * factor_term;
        extra = factor_term * (T(1) - (T(1) - cross) * pi) - ce;
    }
};

// -------------------------------------------------------------------------------------------------
// Combine. The factors are computed from the sums of the images [first, last): one image, or the whole batch.

struct Combine {
    const double* stats;    // [batch, levels, kStats]
    const double* lambdas;  // [levels - 1]
    const double* divisor;  // for Reduction::kMean; null: the weight of the batch's valid pixels
    int64_t batch;
    int levels;
    double alpha;
    bool normalize_factors;  // Z_t = the number of pixels that f_t compares; otherwise Z_t = 1
    bool pool_batch;         // factor_scope = "batch"
    Reduction reduction;

    IAL_HD double stat(int64_t n, int k, Stat s) const { return stats[(n * levels + k) * kStats + s]; }

    IAL_HD double sum(int64_t first, int64_t last, int k, Stat s) const {
        double total = 0;
        IAL_ROLLED
        for (int64_t n = first; n < last; ++n) total += stat(n, k, s);
        return total;
    }

    // As F.cross_entropy(reduction="mean"), we divide by the weight of the batch's valid pixels.
    IAL_HD double mean_divisor() const {
        if (divisor) return *divisor;
        double total = 0;
        IAL_ROLLED
        for (int k = 0; k < levels; ++k) total += sum(0, batch, k, kWeight);
        return total;
    }

    // dL/dIAL_n. grad_loss is indexed: it has one value, or one per image with Reduction::kNone.
    template <typename G>
    IAL_HD double image_gradient(const G& grad_loss, int64_t n, double divided_by) const {
        if (reduction == Reduction::kNone) return grad_loss[n];
        if (reduction == Reduction::kSum) return grad_loss[0];
        return divided_by != 0 ? grad_loss[0] / divided_by : 0;
    }
};

// Eq. 3, one level per step, from the most important level down. Keeps the sums over the levels above t, and
// Z_t.
struct Factor {
    double q2_above = 0, count = 0;
    double f = 0, z = 1;

    IAL_HD void step(const Combine& c, int64_t first, int64_t last, int t) {
        count += c.sum(first, last, t, kCount);
        if (t < c.levels - 1) {
            const double lambda = c.lambdas[t];
            z = c.normalize_factors && count > 0 ? count : 1;
            f = 0.5 * (lambda * c.sum(first, last, t, kP2) + (1 + lambda) * q2_above) / z;
        }
        q2_above += c.sum(first, last, t, kQ2);
    }
};

// factors[t] = f_t for t < g - 1, from the sums of the images [first, last).
IAL_HD void factors(const Combine& c, int64_t first, int64_t last, double* factors) {
    Factor factor;
    IAL_ROLLED
    for (int t = c.levels - 1; t >= 0; --t) {
        factor.step(c, first, last, t);
        if (t < c.levels - 1) factors[t] = factor.f;
    }
}

// IAL_n = T_0,  T_k = S_k + (f_k + alpha) T_{k+1}   (Eqs. 5-8)
IAL_HD double image_loss(const Combine& c, int64_t n, const double* factors) {
    double chain = c.stat(n, c.levels - 1, kS);
    IAL_ROLLED
    for (int k = c.levels - 2; k >= 0; --k) chain = c.stat(n, k, kS) + (factors[k] + c.alpha) * chain;
    return chain;
}

// grad_stats[n, k] = dL/dstats[n, k] of the images [first, last), which share their factors. With lead_k =
// prod_{t<k} F_t,  b_t = lead_t T_{t+1},  G_n = dL/dIAL_n:
//   dL/dS_nk = G_n lead_k
//   dL/dQ2_k = 1/2 sum_{t<k} b_t (1 + lambda_t) / Z_t
//   dL/dP2_k = 1/2 b_k lambda_k / Z_k
// Here S and T are sums over n of G_n S_n and G_n T_n. The first loop stores F_t and T_{t+1} / Z_t in the
// rows of image `first`. The second loop reads them and overwrites them.
template <typename G>
IAL_HD void combine_backward(const Combine& c, int64_t first, int64_t last, const G& grad_loss,
                             double divided_by, double* grad_stats) {
    double* rows = grad_stats + first * c.levels * kStats;
    Factor factor;
    double chain = 0;
    IAL_ROLLED
    for (int t = c.levels - 1; t >= 0; --t) {
        factor.step(c, first, last, t);
        const double f = t < c.levels - 1 ? factor.f + c.alpha : 0;
        rows[t * kStats + kS] = f;
        rows[t * kStats + kP2] = chain / factor.z;
        double s = 0;
        IAL_ROLLED
        for (int64_t n = first; n < last; ++n)
            s += c.image_gradient(grad_loss, n, divided_by) * c.stat(n, t, kS);
        chain = s + f * chain;
    }
    double lead = 1, dq2 = 0;
    IAL_ROLLED
    for (int k = 0; k < c.levels; ++k) {
        const double f = rows[k * kStats + kS], half_b_over_z = 0.5 * lead * rows[k * kStats + kP2];
        const double lambda = k < c.levels - 1 ? c.lambdas[k] : 0;
        IAL_ROLLED
        for (int64_t n = first; n < last; ++n) {
            double* row = grad_stats + (n * c.levels + k) * kStats;
            row[kS] = lead * c.image_gradient(grad_loss, n, divided_by);
            row[kP2] = half_b_over_z * lambda;
            row[kQ2] = dq2;
            row[kCount] = row[kWeight] = 0;
        }
        dq2 += half_b_over_z * (1 + lambda);
        lead *= f;
    }
}

// A derivative of the loss times the incoming gradient. The incoming gradient may be infinite, and 0 must
// stay 0.
IAL_HD double scaled(double derivative, double incoming) {
    return derivative == 0 ? 0 : derivative * incoming;
}

}  // namespace ial
