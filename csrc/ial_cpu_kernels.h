// reduce and gradient on the CPU, over one range of the pixels of one image.
//
// ial_cpu.cpp includes this file once per instruction set, which IAL_ISA names and IAL_TARGET enables for each function,
// and picks one at run time. No lambda is used here: it would not inherit the target.
//
// Pixels go in blocks of B: the block's logits are copied once, converted, into a buffer [C, B] that stays in L1, since
// rows of a megapixel image lie a power of two apart and would evict each other. Every loop over the B pixels has a
// constant length and no branch, so that the compiler turns it into vector code.

namespace ial {
namespace IAL_ISA {

#define IAL_INLINE IAL_TARGET inline __attribute__((always_inline))
#define IAL_SIMD _Pragma("omp simd")

// exp(x) for x <= 0 within 1 ulp; 0 below the smallest normal number, NaN for NaN. x = n ln 2 + r, |r| <= ln(2)/2, and
// exp(r) = 1 + r + r^2 q(r) with q the Chebyshev fit of degree 4 (float: 1.0e-8 relative) or 9 (double: 1.7e-17).
// Adding `shift` = 1.5 * 2^mantissa_bits rounds to the integer n and leaves it in the low bits.
IAL_INLINE float exp_nonpositive(float x) {
    const float shift = 12582912.0f;
    const float n = x * 1.44269504088896341f + shift;
    const float r = (x - (n - shift) * 0.693145751953125f) - (n - shift) * 1.42860682030941723e-6f;
    float q = 1.3926183587713494e-3f;
    q = q * r + 8.363179052722578e-3f;
    q = q * r + 4.1666554617204574e-2f;
    q = q * r + 1.6666576989698775e-1f;
    q = q * r + 0.5f;
    const float power = __builtin_bit_cast(float, (__builtin_bit_cast(int32_t, n) << 23) + 0x3f800000);
    return x < -87.0f ? 0.0f : (1.0f + (r + r * r * q)) * power;
}

IAL_INLINE double exp_nonpositive(double x) {
    const double shift = 6755399441055744.0;
    const double n = x * 1.44269504088896340736 + shift;
    const double r = (x - (n - shift) * 0.69314718036912381649) - (n - shift) * 1.90821492927058770002e-10;
    double q = 2.510038549551032e-8;
    q = q * r + 2.7620088445409746e-7;
    q = q * r + 2.7557268459997064e-6;
    q = q * r + 2.4801521295954376e-5;
    q = q * r + 1.9841269863053618e-4;
    q = q * r + 1.3888888917213717e-3;
    q = q * r + 8.333333333330062e-3;
    q = q * r + 4.166666666662413e-2;
    q = q * r + 1.6666666666666669e-1;
    q = q * r + 0.5;
    const double power =
        __builtin_bit_cast(double, (__builtin_bit_cast(int64_t, n) << 52) + (int64_t(1023) << 52));
    return x < -708.0 ? 0.0 : (1.0 + (r + r * r * q)) * power;
}

// log(s) for s >= 1 or NaN: s = 2^e m with m in [sqrt(1/2), sqrt(2)), z = (m - 1) / (m + 1), |z| <= 0.172, and
// log(m) = 2 (z + z^3/3 + z^5/5 + ...), cut where the next term is below half an ulp.
IAL_INLINE float log_above_one(float s) {
    const int32_t bits = __builtin_bit_cast(int32_t, s) - 0x3f3504f3;
    const float m = __builtin_bit_cast(float, (bits & 0x7fffff) + 0x3f3504f3);
    const float e = static_cast<float>(bits >> 23);
    const float z = (m - 1) / (m + 1), z2 = z * z;
    const float series = 2 + z2 * (2.f / 3 + z2 * (2.f / 5 + z2 * (2.f / 7 + z2 * (2.f / 9))));
    return s == s ? e * 0.693147180559945309f + z * series : s;
}

IAL_INLINE double log_above_one(double s) {
    const int64_t bits = __builtin_bit_cast(int64_t, s) - 0x3fe6a09e667f3bcd;
    const double m = __builtin_bit_cast(double, (bits & 0xfffffffffffff) + 0x3fe6a09e667f3bcd);
    const double e = static_cast<double>(static_cast<int32_t>(bits >> 52));
    const double z = (m - 1) / (m + 1), z2 = z * z;
    double series = 2.0 / 21;
    series = series * z2 + 2.0 / 19;
    series = series * z2 + 2.0 / 17;
    series = series * z2 + 2.0 / 15;
    series = series * z2 + 2.0 / 13;
    series = series * z2 + 2.0 / 11;
    series = series * z2 + 2.0 / 9;
    series = series * z2 + 2.0 / 7;
    series = series * z2 + 2.0 / 5;
    series = series * z2 + 2.0 / 3;
    series = series * z2 + 2.0;
    return s == s ? e * 0.693147180559945309417 + z * series : s;
}

IAL_INLINE float widen(float x) { return x; }
IAL_INLINE double widen(double x) { return x; }
IAL_INLINE float widen(c10::Half x) { return static_cast<float>(x); }
IAL_INLINE float widen(c10::BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.x) << 16); }

IAL_INLINE void narrow(float x, float* to) { *to = x; }
IAL_INLINE void narrow(double x, double* to) { *to = x; }
IAL_INLINE void narrow(float x, c10::Half* to) { *to = static_cast<c10::Half>(x); }
IAL_INLINE void narrow(float x, c10::BFloat16* to) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->x = static_cast<uint16_t>(x == x ? nearest_even : 0x7fc0);
}

// Half precision goes through F16C where the instruction set has it: compilers leave the conversion scalar.
#if IAL_F16C
IAL_INLINE void widen_lanes(const c10::Half* from, float* to, int lanes) {
    for (int j = 0; j < lanes; j += 8)
        _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j))));
}
IAL_INLINE void narrow_lanes(const float* from, c10::Half* to, int lanes) {
    for (int j = 0; j < lanes; j += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(from + j), 0));
}
#endif

template <typename T, typename A>
IAL_INLINE void widen_lanes(const T* from, A* to, int lanes) {
    IAL_SIMD for (int j = 0; j < lanes; ++j) to[j] = widen(from[j]);
}

template <typename T, typename A>
IAL_INLINE void narrow_lanes(const A* from, T* to, int lanes) {
    IAL_SIMD for (int j = 0; j < lanes; ++j) narrow(from[j], to + j);
}

// B pixels of one row of one image, and what the two kernels need of them. Lanes past `count` hold finite values.
template <typename T, int B>
struct Block {
    using A = typename Problem<T>::A;
    using I = typename Problem<T>::I;

    const Problem<T>& problem;
    A* x;  // [C, B]: the logits, after softmax() their exponentials
    int count = 0;
    alignas(64) A max[B], sum[B], w[B], logit[B];  // logit: the target's
    alignas(64) I label[B];                        // the target, -1 where it is ignored

    IAL_INLINE Block(const Problem<T>& problem, A* x) : problem(problem), x(x) {}

    IAL_INLINE void load_logits(int64_t n, int64_t p, int pixels) {
        count = pixels;
        const View& view = problem.layout.logits;
        const int classes = static_cast<int>(problem.layout.classes);
        const T* from = problem.logits + problem.layout.offset(view, n, p);
        IAL_SIMD for (int j = 0; j < B; ++j) max[j] = -__builtin_inf();
        if (count == B && view.pixel == 1) {
            for (int c = 0; c < classes; ++c, from += view.channel) {
                A* row = x + c * B;
                // The hardware follows fewer streams than there are classes.
                for (int line = 0; line < B * int(sizeof(T)); line += 64)
                    __builtin_prefetch(reinterpret_cast<const char*>(from + B) + line);
                widen_lanes(from, row, B);
                IAL_SIMD for (int j = 0; j < B; ++j) max[j] = row[j] > max[j] ? row[j] : max[j];
            }
            return;
        }
        for (int j = 0; j < count; ++j)
            for (int c = 0; c < classes; ++c) x[c * B + j] = widen(from[j * view.pixel + c * view.channel]);
        for (int c = 0; c < classes; ++c) {
            A* row = x + c * B;
            for (int j = count; j < B; ++j) row[j] = 0;
            IAL_SIMD for (int j = 0; j < B; ++j) max[j] = row[j] > max[j] ? row[j] : max[j];
        }
    }

    // The pixel's own weight and its label; a label that is neither a class nor ignore_index is reported and left out.
    IAL_INLINE void load_target(int64_t n, int64_t p, BadLabels* bad) {
        const View& labels = problem.layout.target;
        const View& weights = problem.layout.pixel_weight;
        const int64_t first = problem.layout.offset(labels, n, p);
        const int64_t weight = problem.pixel_weight ? problem.layout.offset(weights, n, p) : 0;
        for (int j = 0; j < B; ++j) label[j] = -1, w[j] = 0, logit[j] = 0;
        for (int j = 0; j < count; ++j) {
            const int64_t y = load_label(problem.target, problem.label, first + j * labels.pixel);
            if (y == problem.ignore_index) continue;
            if (y < 0 || y >= problem.layout.classes) {
                bad->add(y, n, p + j);
                continue;
            }
            label[j] = static_cast<I>(y);
            logit[j] = x[y * B + j];
            w[j] = problem.weight ? problem.weight[y] : A(1);
            if (problem.pixel_weight) w[j] *= problem.pixel_weight[weight + j * weights.pixel];
        }
    }

    // sum_c exp(x_c - max), the exponentials left in x where `keep`.
    template <bool keep>
    IAL_INLINE void softmax() {
        const int classes = static_cast<int>(problem.layout.classes);
        IAL_SIMD for (int j = 0; j < B; ++j) sum[j] = 0;
        for (int c = 0; c < classes; ++c) {
            A* row = x + c * B;
            IAL_SIMD for (int j = 0; j < B; ++j) {
                const A e = exp_nonpositive(row[j] - max[j]);
                sum[j] += e;
                if (keep) row[j] = e;
            }
        }
    }

    // stats[levels + 1, kStats] += the block's pixels; the last row takes the ignored ones.
    IAL_INLINE void accumulate(double* stats) {
        alignas(64) A nll[B], pi[B];
        IAL_SIMD for (int j = 0; j < B; ++j) {
            const A shifted = logit[j] - max[j];
            nll[j] = log_above_one(sum[j]) - shifted;
            pi[j] = exp_nonpositive(shifted) / sum[j];
        }
        for (int j = 0; j < count; ++j) {
            const int level = label[j] < 0 ? problem.levels : problem.class_levels[label[j]];
            double* s = stats + level * kStats;
            s[kS] += w[j] * nll[j];
            s[kP2] += pi[j] * pi[j];
            s[kQ2] += (1 - pi[j]) * (1 - pi[j]);
            s[kCount] += 1;
            s[kWeight] += w[j];
        }
    }

    // rows: [C, 3], by class the dL/dS, dL/dP2 and dL/dQ2 of its level
    IAL_INLINE void store_gradient(int64_t n, int64_t p, const A* rows) {
        alignas(64) A ds[B], dp2[B], dq2[B], scale[B], extra[B], g[B];
        const int classes = static_cast<int>(problem.layout.classes);
        for (int j = 0; j < B; ++j) {
            const A* row = rows + (label[j] < 0 ? 0 : label[j]) * 3;
            ds[j] = row[kS], dp2[j] = row[kP2], dq2[j] = row[kQ2];
            // Ignored pixels have gradient zero whatever their logits are, and 0 * NaN is not.
            if (label[j] < 0 && sum[j] != sum[j])
                for (int c = 0; c < classes; ++c) x[c * B + j] = 0;
        }
        const bool exact = problem.exact;
        IAL_SIMD for (int j = 0; j < B; ++j) {
            const A pi = exp_nonpositive(logit[j] - max[j]) / sum[j];
            const PixelGradient<A> pixel = pixel_gradient(ds[j], dp2[j], dq2[j], w[j], pi, exact);
            scale[j] = label[j] < 0 ? 0 : pixel.scale / sum[j];
            extra[j] = label[j] < 0 ? 0 : pixel.extra;
        }
        const View& view = problem.layout.grad;
        T* to = problem.grad + problem.layout.offset(view, n, p);
        for (I c = 0; c < classes; ++c) {
            A* row = x + c * B;
            IAL_SIMD for (int j = 0; j < B; ++j) g[j] = row[j] * scale[j] + (label[j] == c ? extra[j] : A(0));
            if (count == B && view.pixel == 1)
                narrow_lanes(g, to + c * view.channel, B);
            else
                for (int j = 0; j < B; ++j) row[j] = g[j];
        }
        if (count == B && view.pixel == 1) return;
        for (int j = 0; j < count; ++j)
            for (int c = 0; c < classes; ++c) narrow(x[c * B + j], to + j * view.pixel + c * view.channel);
    }
};

// What the two kernels do with a block once its logits and labels are there.
struct Reduce {
    double* stats;  // [levels + 1, kStats]
    BadLabels* bad;

    template <typename T, int B>
    IAL_INLINE void run(Block<T, B>& block, int64_t n, int64_t p) const {
        block.load_target(n, p, bad);
        block.template softmax<false>();
        block.accumulate(stats);
    }
};

template <typename A>
struct Gradient {
    const A* rows;  // [C, 3]

    template <typename T, int B>
    IAL_INLINE void run(Block<T, B>& block, int64_t n, int64_t p) const {
        BadLabels reported_by_reduce;
        block.load_target(n, p, &reported_by_reduce);
        block.template softmax<true>();
        block.store_gradient(n, p, rows);
    }
};

// The pixels [begin, end) of image n. Blocks never cross the end of a row or of the range, and a short rest goes in
// narrow blocks: which lane a pixel falls into depends on the shapes alone, never on the number of threads.
// buffer: [C, kWide]
template <typename T, typename Kernel>
IAL_INLINE void for_blocks(const Problem<T>& problem, int64_t n, int64_t begin, int64_t end, typename Problem<T>::A* buffer,
                const Kernel& kernel) {
    const int64_t row = problem.layout.row;
    for (int64_t p = begin; p < end;) {
        const int64_t in_row = row - p % row, rest = end - p < in_row ? end - p : in_row;
        if (rest >= kWide) {
            Block<T, kWide> block(problem, buffer);
            block.load_logits(n, p, kWide);
            kernel.run(block, n, p);
            p += kWide;
        } else {
            const int count = static_cast<int>(rest < kNarrow ? rest : kNarrow);
            Block<T, kNarrow> block(problem, buffer);
            block.load_logits(n, p, count);
            kernel.run(block, n, p);
            p += count;
        }
    }
}

template <typename T>
IAL_TARGET void reduce(const Problem<T>& problem, int64_t n, int64_t begin, int64_t end, typename Problem<T>::A* buffer,
            double* stats, BadLabels* bad) {
    for_blocks(problem, n, begin, end, buffer, Reduce{stats, bad});
}

template <typename T>
IAL_TARGET void gradient(const Problem<T>& problem, int64_t n, int64_t begin, int64_t end,
              typename Problem<T>::A* buffer, const typename Problem<T>::A* rows) {
    for_blocks(problem, n, begin, end, buffer, Gradient<typename Problem<T>::A>{rows});
}

#undef IAL_INLINE
#undef IAL_SIMD

}  // namespace IAL_ISA
}  // namespace ial
