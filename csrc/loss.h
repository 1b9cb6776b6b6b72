// The mathematics of the Importance-Aware Loss (Chen, Gong, Yang, IJCAI 2017), shared by host and device
// code.
//
//   reduce    one read of the logits: per image n and level k five sums, stats[N, g, 5]
//   combine   stats -> the factors f_t and the loss                          (Eqs. 3-8)
//   table     stats and the incoming gradient -> table = dL/dstats[N, g, 5]
//   gradient  one read of the logits, one write of their gradient            (Eqs. 9-19)
//
// The loss sees the logits through `stats` alone, so a level's row of `table` is all that a pixel must know
// of the rest of the batch: alpha, lambda, the normalisations, the reduction and the incoming gradient stay
// out of the kernels. No torch and no CUDA header here: every struct is plain, every size and stride is in
// elements.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define IAL_HD __host__ __device__ __forceinline__
#define IAL_ROLLED _Pragma("unroll 1")  // a loop that is not worth code of its own for each turn
#else
#define IAL_HD inline __attribute__((always_inline))
#define IAL_ROLLED
#endif

namespace ial {

// The five sums of a level. S is w'l of Eqs. 1 and 2; P2 and Q2 are the two values that (pi - M_t)^2 takes in
// Eq. 3. The other two are the number of pixels and the sum of their weights, constants to the derivative.
enum Stat : int { kS, kP2, kQ2, kCount, kWeight, kStats };

enum class Reduction : int { kMean, kSum, kNone };
enum class Label : int { kUInt8, kInt32, kInt64 };

// -------------------------------------------------------------------------------------------------
// Layout: where pixel p of image n lies, for tensors (N, C, *spatial) or (N, *spatial) of any stride.
// Spatial dimensions that every tensor traverses as one are merged, so `outer_rank` is 0 for contiguous and
// for channels_last tensors; a pixel index then counts along rows of `row` pixels.

constexpr int kMaxOuter = 6;

struct View {
    int64_t batch, channel, pixel, outer[kMaxOuter];  // strides; `pixel` is the one along a row
};

struct Layout {
    int64_t batch, classes, pixels, row;
    int outer_rank;
    int64_t outer[kMaxOuter];  // sizes of the dimensions around a row, outermost first
    View logits, grad, target, pixel_weight;

    IAL_HD int64_t offset(const View& view, int64_t n, int64_t p) const {
        if (outer_rank == 0) return n * view.batch + p * view.pixel;
        int64_t offset = n * view.batch + p % row * view.pixel;
        int64_t r = p / row;
        IAL_ROLLED
        for (int d = outer_rank - 1; d >= 0; --d) {
            offset += r % outer[d] * view.outer[d];
            r /= outer[d];
        }
        return offset;
    }
};

IAL_HD int64_t load_label(const void* target, Label type, int64_t i) {
    switch (type) {
        case Label::kUInt8:
            return static_cast<const uint8_t*>(target)[i];
        case Label::kInt32:
            return static_cast<const int32_t*>(target)[i];
        default:
            return static_cast<const int64_t*>(target)[i];
    }
}

// -------------------------------------------------------------------------------------------------
// One pixel: its gradient is  dL/dX_c = scale p_c + [c = y] extra.
//
// With ce = w dL/dS and reach = pi dL/dpi = 2 pi (pi dL/dP2 - (1 - pi) dL/dQ2), the part of the loss that
// gets to the pixel through the factors (Eq. 16's A, times what multiplies it in Eqs. 10-13):
//   exact   dL/dX_c = (p_c - [c=y]) (ce - reach)
//   paper   dL/dX_c = (p_c - [c=y]) ce + [c=y] (1 - pi) reach      Eq. 15: dpi/dX has its own channel only
// `cross` is 1 for the exact form and 0 for the paper's: whether dpi crosses over to the other channels.

template <typename T>
struct PixelGradient {
    T scale, extra;

    IAL_HD PixelGradient(T ce, T dp2, T dq2, T pi, T cross) {
        const T reach = T(2) * pi * (pi * dp2 - (T(1) - pi) * dq2);
        scale = ce - cross * reach;
        extra = reach * (T(1) - (T(1) - cross) * pi) - ce;
    }
};

// -------------------------------------------------------------------------------------------------
// Combine. The factors of an image come from its own sums, or from those of the whole batch: images [first,
// last).

struct Combine {
    const double* stats;    // [batch, levels, kStats]
    const double* lambdas;  // [levels - 1]
    int64_t batch;
    int levels;
    double alpha;
    bool normalize_factors;  // Z_t = the pixels that f_t compares; else Z_t = 1
    bool pool_batch;         // factor_scope = "batch"
    Reduction reduction;

    IAL_HD double stat(int64_t n, int k, Stat s) const { return stats[(n * levels + k) * kStats + s]; }

    IAL_HD double sum(int64_t first, int64_t last, int k, Stat s) const {
        double total = 0;
        IAL_ROLLED
        for (int64_t n = first; n < last; ++n) total += stat(n, k, s);
        return total;
    }

    // The weight of the valid pixels of the batch, the divisor of F.cross_entropy(reduction="mean").
    IAL_HD double weight() const {
        double total = 0;
        IAL_ROLLED
        for (int k = 0; k < levels; ++k) total += sum(0, batch, k, kWeight);
        return total;
    }

    // dL/dIAL_n for the incoming gradient of the loss, indexed: one value, or one per image.
    template <typename G>
    IAL_HD double image_gradient(const G& grad_loss, int64_t n, double total_weight) const {
        if (reduction == Reduction::kNone) return grad_loss[n];
        if (reduction == Reduction::kSum) return grad_loss[0];
        return total_weight != 0 ? grad_loss[0] / total_weight : 0;
    }
};

// What Eq. 3 needs when it is walked from the most important level down: sums over the levels above t, and
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

// factors[t] = f_t for t < g - 1, from the sums of images [first, last).
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

// table[n, k] = dL/dstats[n, k] for the images [first, last), which share their factors. With lead_k =
// prod_{t<k} F_t, b_t = lead_t T_{t+1} and G_n = dL/dIAL_n (S and T here: sums over n of G_n S_n and G_n
// T_n):
//   dL/dS_nk = G_n lead_k,  dL/dQ2_k = 1/2 sum_{t<k} b_t (1 + lambda_t) / Z_t,  dL/dP2_k = 1/2 b_k lambda_k /
//   Z_k
// Down the levels, F_t and T_{t+1} / Z_t are left in the rows of image `first`; up again they are used.
template <typename G>
IAL_HD void table(const Combine& c, int64_t first, int64_t last, const G& grad_loss, double total_weight,
                  double* table) {
    double* rows = table + first * c.levels * kStats;
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
            s += c.image_gradient(grad_loss, n, total_weight) * c.stat(n, t, kS);
        chain = s + f * chain;
    }
    double lead = 1, dq2 = 0;
    IAL_ROLLED
    for (int k = 0; k < c.levels; ++k) {
        const double f = rows[k * kStats + kS], half_b_over_z = 0.5 * lead * rows[k * kStats + kP2];
        const double lambda = k < c.levels - 1 ? c.lambdas[k] : 0;
        IAL_ROLLED
        for (int64_t n = first; n < last; ++n) {
            double* row = table + (n * c.levels + k) * kStats;
            row[kS] = lead * c.image_gradient(grad_loss, n, total_weight);
            row[kP2] = half_b_over_z * lambda;
            row[kQ2] = dq2;
            row[kCount] = row[kWeight] = 0;
        }
        dq2 += half_b_over_z * (1 + lambda);
        lead *= f;
    }
}

}  // namespace ial
