// reduce and gradient on the CPU, over one range of the pixels of one image.
//
// cpu/operators.cpp includes this file once per instruction set, which IAL_ISA names and IAL_TARGET enables
// for each function, and picks one at run time. No lambda is used here: it would not inherit the target.
//
// Pixels go in blocks of B: the block's logits are copied once, converted, into a buffer [C, B] that stays in
// L1, since rows of a megapixel image lie a power of two apart and would evict each other. Every loop over
// the B pixels has a constant length and no branch, so that the compiler turns it into vector code.

namespace ial {
namespace IAL_ISA {

// exp(x) for x <= 0 within 1.5 ulp; 0 below the smallest normal number, NaN for NaN. x = n ln 2 + r, |r| <=
// ln(2)/2, and exp(r) = 1 + r + r^2 q(r) with q the Chebyshev fit of degree 4 (float: 1.0e-8 relative) or 9
// (double: 1.7e-17). Adding `shift` = 1.5 * 2^mantissa_bits + bias rounds to the integer n and leaves n +
// bias, the exponent of 2^n, in the low bits; below the range n stops at -bias, where that exponent means 0.
// In float, n times the error of ln 2 (1.9e-9) stays below half an ulp for x > -20, and what is smaller
// hardly adds to a sum that holds a 1.
IAL_INLINE float exp_nonpositive(float x) {
    const float shift = 12582912.0f + 127.0f, least = -88.0f;
    x = least > x ? least : x;
    const float n = x * 1.44269504088896341f + shift;
    const float r = x - (n - shift) * 0.693147180559945309f;
    float e = 1.3926183587713494e-3f;
    e = e * r + 8.363179052722578e-3f;
    e = e * r + 4.1666554617204574e-2f;
    e = e * r + 1.6666576989698775e-1f;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    return e * __builtin_bit_cast(float, __builtin_bit_cast(int32_t, n) << 23);
}

IAL_INLINE double exp_nonpositive(double x) {
    const double shift = 6755399441055744.0 + 1023.0, least = -709.0;
    x = least > x ? least : x;
    const double n = x * 1.44269504088896340736 + shift;
    const double r = (x - (n - shift) * 0.69314718036912381649) - (n - shift) * 1.90821492927058770002e-10;
    double e = 2.510038549551032e-8;
    e = e * r + 2.7620088445409746e-7;
    e = e * r + 2.7557268459997064e-6;
    e = e * r + 2.4801521295954376e-5;
    e = e * r + 1.9841269863053618e-4;
    e = e * r + 1.3888888917213717e-3;
    e = e * r + 8.333333333330062e-3;
    e = e * r + 4.166666666662413e-2;
    e = e * r + 1.6666666666666669e-1;
    e = e * r + 0.5;
    e = e * r + 1.0;
    e = e * r + 1.0;
    return e * __builtin_bit_cast(double, __builtin_bit_cast(int64_t, n) << 52);
}

// log(s) for s >= 1 or NaN: s = 2^e m with m in [sqrt(1/2), sqrt(2)). In float, where a division takes as
// long as six multiplications, log(1 + f) = f - f^2/2 + f^3 q(f) with q the Chebyshev fit of degree 7 (2.0e-8
// relative). In double, with z = (m - 1) / (m + 1), |z| <= 0.172, log(m) = 2 (z + z^3/3 + z^5/5 + ...), cut
// where the next term is below half an ulp.
IAL_INLINE float log_above_one(float s) {
    const int32_t bits = __builtin_bit_cast(int32_t, s) - 0x3f3504f3;
    const float m = __builtin_bit_cast(float, (bits & 0x7fffff) + 0x3f3504f3);
    const float e = static_cast<float>(bits >> 23);
    const float f = m - 1, f2 = f * f;
    float q = -7.902743772e-02f;
    q = q * f + 1.262231985e-01f;
    q = q * f - 1.299818376e-01f;
    q = q * f + 1.421449592e-01f;
    q = q * f - 1.664128146e-01f;
    q = q * f + 2.000104509e-01f;
    q = q * f - 2.500030642e-01f;
    q = q * f + 3.333333073e-01f;
    const float log_m = (f - 0.5f * f2) + f * f2 * q;
    return s == s ? e * 0.693147180559945309f + log_m : s;
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
IAL_INLINE float widen(c10::BFloat16 x) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(x.x) << 16);
}

IAL_INLINE void narrow(float x, float* to) { *to = x; }
IAL_INLINE void narrow(double x, double* to) { *to = x; }
IAL_INLINE void narrow(float x, c10::Half* to) { *to = static_cast<c10::Half>(x); }
IAL_INLINE void narrow(float x, c10::BFloat16* to) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->x = static_cast<uint16_t>(x == x ? nearest_even : 0x7fc0);
}

// Half precision goes through F16C where the instruction set has it: compilers leave the conversion scalar.
#if IAL_X86_VECTORS
IAL_INLINE void widen_lanes(const c10::Half* from, float* to, int lanes) {
    for (int j = 0; j < lanes; j += 8)
        _mm256_storeu_ps(to + j,
                         _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j))));
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

// narrow_lanes past the caches: what is too large for its reader to find there need not be read before it is
// written.
#if IAL_X86_VECTORS
IAL_INLINE void stream_lanes(const float* from, c10::Half* to, int lanes) {
    for (int j = 0; j < lanes; j += 8)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(from + j), 0));
}
#endif

template <typename T, typename A>
IAL_INLINE void stream_lanes(const A* from, T* to, int lanes) {
#if IAL_X86_VECTORS
    alignas(kStreamBytes) T narrowed[kStreamBytes / sizeof(T)];
    constexpr int step = kStreamBytes / sizeof(T);
    for (int j = 0; j < lanes; j += step) {
        narrow_lanes(from + j, narrowed, step);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + j), *reinterpret_cast<const __m256i*>(narrowed));
    }
#else
    narrow_lanes(from, to, lanes);
#endif
}

IAL_INLINE bool aligned(const void* address) {
    return reinterpret_cast<uintptr_t>(address) % kStreamBytes == 0;
}

// to[j * to_stride + i] = from[i * from_stride + j] of kTile x kTile numbers. Of channels_last logits a
// pixel's classes lie side by side, and one by one they would take longer to move than all that is computed
// of them.
#if IAL_X86_VECTORS
IAL_INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    __m256 v[kTile];  // the first four of rows i and i + 4, then their last four
    for (int i = 0; i < kTile; ++i) {
        const float* const row = from + i % 4 * from_stride + i / 4 * 4;
        v[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)),
                                    _mm_loadu_ps(row + 4 * from_stride), 1);
    }
    for (int i = 0; i < kTile; i += 4, to += 4 * to_stride) {
        const __m256 a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
        const __m256 c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
        _mm256_storeu_ps(to, _mm256_shuffle_ps(a, c, 0x44));
        _mm256_storeu_ps(to + to_stride, _mm256_shuffle_ps(a, c, 0xee));
        _mm256_storeu_ps(to + 2 * to_stride, _mm256_shuffle_ps(b, d, 0x44));
        _mm256_storeu_ps(to + 3 * to_stride, _mm256_shuffle_ps(b, d, 0xee));
    }
}

template <typename T>
IAL_INLINE void transpose(const T* from, int64_t from_stride, float* to, int64_t to_stride) {
    alignas(64) float tile[kTile * kTile];
    for (int i = 0; i < kTile; ++i) widen_lanes(from + i * from_stride, tile + i * kTile, kTile);
    transpose(tile, kTile, to, to_stride);
}

template <typename T>
IAL_INLINE void transpose(const float* from, int64_t from_stride, T* to, int64_t to_stride) {
    alignas(64) float tile[kTile * kTile];
    transpose(from, from_stride, tile, kTile);
    for (int i = 0; i < kTile; ++i) narrow_lanes(tile + i * kTile, to + i * to_stride, kTile);
}
#endif

// B pixels of one row of one image, and what the two kernels need of them. Lanes past `count` hold
// leftovers, under labels that are no class.
template <typename T, int B>
struct Block {
    using A = typename Problem<T>::A;
    using I = typename Problem<T>::I;
    static constexpr I kNone = std::numeric_limits<I>::max();
    static constexpr bool kTiles = IAL_X86_VECTORS && std::is_same_v<A, float>;

    const Problem<T>& problem;
    const int classes;
    A *x, *x_ahead;  // [C, B] each: the logits, after softmax() their exponentials; those of the block after
                     // this one
    int count = 0;
    bool bad_labels = false;
    alignas(64) A max[B], max_ahead[B], sum[B], w[B];
    alignas(64) I label[B];  // -1 where it is no class
    I listed[kFew];          // the classes among them, if there are few
    int classes_listed = 0;
    bool few = true;

    IAL_INLINE Block(const Problem<T>& problem, A* buffer)
        : problem(problem),
          classes(static_cast<int>(problem.layout.classes)),
          x(buffer),
          x_ahead(buffer + problem.layout.classes * B) {}

    IAL_INLINE void load_logits(int64_t n, int64_t p, int pixels) {
        const View& view = problem.layout.logits;
        const T* from = problem.logits + problem.layout.offset(view, n, p);
        count = pixels;
        IAL_SIMD for (int j = 0; j < B; ++j) max[j] = -__builtin_inf();
        if (count == B && view.pixel == 1) {
            for (int c = 0; c < classes; ++c) load_row(from + c * view.channel, x + c * B, max);
            return;
        }
        if (in_tiles(view)) {
            if constexpr (kTiles)
                for (int j = 0; j < B; j += kTile)
                    for (int i = 0; i < classes; i += kTile) {
                        const int c = last_tile(i);
                        transpose(from + j * view.pixel + c, view.pixel, x + c * B + j, B);
                    }
        } else {
            for (int j = 0; j < count; ++j)
                for (int c = 0; c < classes; ++c)
                    x[c * B + j] = widen(from[j * view.pixel + c * view.channel]);
        }
        for (int c = 0; c < classes; ++c) {
            A* row = x + c * B;
            IAL_SIMD for (int j = 0; j < B; ++j) max[j] = row[j] > max[j] ? row[j] : max[j];
        }
    }

    // Whether the pixels' classes can be moved as tiles.
    IAL_INLINE bool in_tiles(const View& view) const {
        return kTiles && count == B && view.channel == 1 && classes >= kTile;
    }

    // Where a tile of classes begins that ends with the last one at the latest: it may repeat some.
    IAL_INLINE int last_tile(int c) const { return c < classes - kTile ? c : classes - kTile; }

    IAL_INLINE void load_row(const T* from, A* row, A* max) {
        widen_lanes(from, row, B);
        IAL_SIMD for (int j = 0; j < B; ++j) max[j] = row[j] > max[j] ? row[j] : max[j];
    }

    template <typename U>
    IAL_INLINE static void prefetch(const U* lanes) {
        for (int line = 0; line < B * int(sizeof(U)); line += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(lanes) + line);
    }

    // Makes the block loaded ahead the current one.
    IAL_INLINE void advance() {
        A* const done = x;
        x = x_ahead;
        x_ahead = done;
        IAL_SIMD for (int j = 0; j < B; ++j) max[j] = max_ahead[j];
    }

    // Labels that are neither a class nor ignore_index set bad_labels. Where all of a block fit the integers
    // that they are held in, which the others hardly ever do, they are compared as such.
    template <typename L>
    IAL_INLINE void load_labels(const L* from, int64_t stride) {
        const int64_t ignore = problem.ignore_index;
        const bool dense = count == B && stride == 1;
        if (dense) prefetch(from + B);
        if (dense && ignore == static_cast<I>(ignore) && copy_labels(from)) {
            bad_labels = check_labels(label, static_cast<I>(ignore));
        } else {
            alignas(64) int64_t labels[B];
            for (int j = 0; j < B; ++j) labels[j] = j < count ? from[j * stride] : ignore;
            bad_labels = check_labels(labels, ignore);
        }
    }

    // Whether all of them fit.
    template <typename L>
    IAL_INLINE bool copy_labels(const L* from) {
        int64_t lost = 0;
        _Pragma("omp simd reduction(| : lost)") for (int j = 0; j < B; ++j) {
            label[j] = static_cast<I>(from[j]);
            lost |= int64_t(from[j]) ^ int64_t(label[j]);
        }
        return lost == 0;
    }

    // label[j] = from[j], -1 where that is no class; whether one is not ignore_index either.
    template <typename L>
    IAL_INLINE bool check_labels(const L* from, L ignore) {
        const L most = static_cast<L>(classes - 1);
        int bad = 0;
        _Pragma("omp simd reduction(| : bad)") for (int j = 0; j < B; ++j) {
            const L y = from[j];
            const bool is_class = y >= 0 && y <= most && y != ignore;
            label[j] = is_class ? static_cast<I>(y) : I(-1);
            bad |= !is_class && y != ignore;
        }
        return bad != 0;
    }

    // The least of the keys above `last`, or kNone; both are -1 or more. Unsigned, what is not above it comes
    // last.
    IAL_INLINE static I next_above(I last, const I* keys) {
        using U = std::make_unsigned_t<I>;
        const U first = U(last) + 1;
        U least = U(-1);
        _Pragma("omp simd reduction(min : least)") for (int j = 0; j < B; ++j) {
            const U beyond = U(keys[j]) - first;
            least = beyond < least ? beyond : least;
        }
        return least < U(kNone) ? I(first + least) : kNone;
    }

    // Pixels side by side are mostly of one to three classes, and what these have need not be looked up for
    // each pixel.
    IAL_INLINE void list_labels() {
        listed[0] = 0;
        classes_listed = 0;
        few = true;
        for (I y = next_above(-1, label); few && y != kNone; y = next_above(y, label)) {
            few = classes_listed < kFew;
            if (few) listed[classes_listed++] = y;
        }
    }

    // to[j] = what values, [C, lanes] with 1 or B lanes, has for the class of pixel j; anything where it has
    // none.
    template <int lanes, typename V, typename U>
    IAL_INLINE void select(const V* values, U* to) const {
        if (few) {
            const V* row = values + listed[0] * lanes;
            IAL_SIMD for (int j = 0; j < B; ++j) to[j] = row[j % lanes];
            for (int i = 1; i < classes_listed; ++i) {
                const I y = listed[i];
                row = values + y * lanes;
                IAL_SIMD for (int j = 0; j < B; ++j) {
                    const U value = row[j % lanes];
                    to[j] = label[j] == y ? value : to[j];
                }
            }
        } else {
            alignas(64) I some_class[B];
            IAL_SIMD for (int j = 0; j < B; ++j) some_class[j] = label[j] < 0 ? I(0) : label[j];
            for (int j = 0; j < B; ++j) to[j] = values[some_class[j] * lanes + j % lanes];
        }
    }

    IAL_INLINE void load_target(int64_t n, int64_t p) {
        const View& labels = problem.layout.target;
        const int64_t first = problem.layout.offset(labels, n, p);
        switch (problem.label) {
            case Label::kUInt8:
                load_labels(static_cast<const uint8_t*>(problem.target) + first, labels.pixel);
                break;
            case Label::kInt32:
                load_labels(static_cast<const int32_t*>(problem.target) + first, labels.pixel);
                break;
            default:
                load_labels(static_cast<const int64_t*>(problem.target) + first, labels.pixel);
        }
        list_labels();
    }

    // w[j] = by_class[class of pixel j], times the pixel's weight; anything where it has no class.
    IAL_INLINE void weigh(const A* by_class, int64_t n, int64_t p) {
        select<1>(by_class, w);
        if (!problem.pixel_weight) return;
        const View& weights = problem.layout.pixel_weight;
        const A* from = problem.pixel_weight + problem.layout.offset(weights, n, p);
        for (int j = 0; j < count; ++j) w[j] *= from[j * weights.pixel];
    }

    // Labels that are neither a class nor ignore_index.
    IAL_INLINE void report(int64_t n, int64_t p, BadLabels* bad) const {
        if (!bad_labels) return;
        const View& labels = problem.layout.target;
        const int64_t first = problem.layout.offset(labels, n, p);
        for (int j = 0; j < count; ++j) {
            const int64_t y = load_label(problem.target, problem.label, first + j * labels.pixel);
            if (label[j] < 0 && y != problem.ignore_index) bad->add(y, n, p + j);
        }
    }

    // sum_c exp(x_c - max), the exponentials left in x where `keep`. Where `ahead` points to the logits of
    // the block after this one, they are loaded on the way: memory works while the arithmetic does, and each
    // line is used as it comes, before the other rows of an image whose rows lie a power of two apart evict
    // it.
    template <bool keep>
    IAL_INLINE void softmax(const T* ahead) {
        IAL_SIMD for (int j = 0; j < B; ++j) {
            sum[j] = 0;
            max_ahead[j] = -__builtin_inf();
        }
        if (ahead) {
            const int64_t channel = problem.layout.logits.channel;
            for (int c = 0; c < classes; ++c) {
                const int row = c + (kRowsAhead < classes ? kRowsAhead : classes);
                prefetch(row < classes ? ahead + row * channel : ahead + B + (row - classes) * channel);
                exponentials<keep>(x + c * B);
                load_row(ahead + c * channel, x_ahead + c * B, max_ahead);
            }
        } else {
            for (int c = 0; c < classes; ++c) exponentials<keep>(x + c * B);
        }
    }

    template <bool keep>
    IAL_INLINE void exponentials(A* row) {
        IAL_SIMD for (int j = 0; j < B; ++j) {
            const A e = exp_nonpositive(row[j] - max[j]);
            sum[j] += e;
            if (keep) row[j] = e;
        }
    }

    // sums[levels, kStats, kLanes] += the block's pixels, in one sweep for each of a few classes, else for
    // each level that they have.
    IAL_INLINE void accumulate(double* sums) {
        alignas(64) A logit[B], s[B], p2[B], q2[B];
        select<B>(x, logit);
        IAL_SIMD for (int j = 0; j < B; ++j) {
            const A shifted = logit[j] - max[j];
            const A pi = exp_nonpositive(shifted) / sum[j];
            s[j] = w[j] * (log_above_one(sum[j]) - shifted);
            p2[j] = pi * pi;
            q2[j] = (1 - pi) * (1 - pi);
        }
        if (few) {
            for (int i = 0; i < classes_listed; ++i)
                add(s, p2, q2, label, listed[i], sums + problem.class_levels[listed[i]] * kStats * kLanes);
        } else {
            alignas(64) I level[B];
            select<1>(problem.class_levels, level);
            IAL_SIMD for (int j = 0; j < B; ++j) level[j] = label[j] < 0 ? I(-1) : level[j];
            for (I k = next_above(-1, level); k != kNone; k = next_above(k, level))
                add(s, p2, q2, level, k, sums + k * kStats * kLanes);
        }
    }

    // to[kStats, kLanes] += the pixels of one key
    IAL_INLINE void add(const A* s, const A* p2, const A* q2, const I* keys, I key, double* to) const {
        alignas(64) A one[B];
        IAL_SIMD for (int j = 0; j < B; ++j) one[j] = 1;
        add(s, keys, key, to + kS * kLanes);
        add(p2, keys, key, to + kP2 * kLanes);
        add(q2, keys, key, to + kQ2 * kLanes);
        add(one, keys, key, to + kCount * kLanes);
        add(w, keys, key, to + kWeight * kLanes);
    }

    IAL_INLINE static void add(const A* values, const I* keys, I key, double* to) {
        IAL_SIMD for (int l = 0; l < kLanes; ++l) {
            A total = 0;
            IAL_UNROLL for (int i = 0; i < B; i += kLanes) total += keys[i + l] == key ? values[i + l] : A(0);
            to[l] += total;
        }
    }

    // Of a block after softmax<true>(), weighed by dL/dS: dL/dx_c = scale x_c + [c = y] extra.
    // rows: [3, C], the dL/dS, dL/dP2 and dL/dQ2 of each class, the first times the class's weight
    IAL_INLINE void differentiate(const A* rows, A* scale, A* extra) {
        alignas(64) A e[B], dp2[B], dq2[B];
        select<B>(x, e);
        select<1>(rows + kP2 * classes, dp2);
        select<1>(rows + kQ2 * classes, dq2);
        const A cross = problem.cross;
        int spoilt = 0;
        _Pragma("omp simd reduction(| : spoilt)") for (int j = 0; j < B; ++j) {
            const A inverse = 1 / sum[j];
            const PixelGradient<A> pixel(w[j], dp2[j], dq2[j], e[j] * inverse, cross);
            scale[j] = label[j] < 0 ? 0 : pixel.scale * inverse;
            extra[j] = label[j] < 0 ? 0 : pixel.extra;
            spoilt |= label[j] < 0 && sum[j] != sum[j];
        }
        // Ignored pixels have gradient zero whatever their logits are, and 0 * NaN is not.
        if (spoilt)
            for (int j = 0; j < B; ++j)
                for (int c = 0; label[j] < 0 && c < classes; ++c) x[c * B + j] = 0;
    }

    IAL_INLINE void store_gradient(int64_t n, int64_t p, const A* rows) {
        alignas(64) A scale[B], extra[B];
        differentiate(rows, scale, extra);
        const View& view = problem.layout.grad;
        T* to = problem.grad + problem.layout.offset(view, n, p);
        const bool dense = count == B && view.pixel == 1;
        const bool stream =
            dense && problem.stream && aligned(to) && view.channel * sizeof(T) % kStreamBytes == 0;
        for (I c = 0; c < classes; ++c) {
            A* row = x + c * B;
            if (dense) {
                alignas(64) A g[B];
                IAL_SIMD for (int j = 0; j < B; ++j) g[j] =
                    row[j] * scale[j] + (label[j] == c ? extra[j] : A(0));
                stream ? stream_lanes(g, to + c * view.channel, B)
                       : narrow_lanes(g, to + c * view.channel, B);
            } else {
                IAL_SIMD for (int j = 0; j < B; ++j) row[j] =
                    row[j] * scale[j] + (label[j] == c ? extra[j] : A(0));
            }
        }
        if (dense) return;
        if (in_tiles(view)) {
            if constexpr (kTiles)
                for (int j = 0; j < B; j += kTile)
                    for (int i = 0; i < classes; i += kTile) {
                        const int c = last_tile(i);
                        transpose(x + c * B + j, B, to + j * view.pixel + c, view.pixel);
                    }
        } else {
            for (int j = 0; j < count; ++j)
                for (int c = 0; c < classes; ++c)
                    narrow(x[c * B + j], to + j * view.pixel + c * view.channel);
        }
    }
};

// What the two kernels do with a block once its logits are there; `ahead` as in softmax().
struct Reduce {
    double* sums;  // [levels, kStats, kLanes]
    BadLabels* bad;

    template <typename T, int B>
    IAL_INLINE void run(Block<T, B>& block, int64_t n, int64_t p, const T* ahead) const {
        block.load_target(n, p);
        block.report(n, p, bad);
        block.weigh(block.problem.weight, n, p);
        block.template softmax<false>(ahead);
        block.accumulate(sums);
    }
};

template <typename A>
struct Gradient {
    const A* rows;  // [3, C]

    template <typename T, int B>
    IAL_INLINE void run(Block<T, B>& block, int64_t n, int64_t p, const T* ahead) const {
        block.load_target(n, p);
        block.weigh(rows + kS * block.classes, n, p);
        block.template softmax<true>(ahead);
        block.store_gradient(n, p, rows);
    }
};

// The pixels [begin, end) of image n. Blocks never cross the end of a row or of the range, and a short rest
// goes in narrow blocks: which lane a pixel falls into depends on the shapes alone, never on the number of
// threads. buffer: [2, C, kWide]
template <typename T, typename Kernel>
IAL_INLINE void for_blocks(const Problem<T>& problem, int64_t n, int64_t begin, int64_t end,
                           typename Problem<T>::A* buffer, const Kernel& kernel) {
    const Layout& layout = problem.layout;
    for (int64_t p = begin; p < end;) {
        const int64_t in_row = layout.row - p % layout.row;
        const int64_t stop = p + (end - p < in_row ? end - p : in_row);
        if (stop - p >= kWide) {
            Block<T, kWide> block(problem, buffer);
            block.load_logits(n, p, kWide);
            for (; stop - p >= kWide; p += kWide) {
                const bool more = stop - p >= 2 * kWide;
                const bool dense = layout.logits.pixel == 1;
                kernel.run(
                    block, n, p,
                    more && dense ? problem.logits + layout.offset(layout.logits, n, p + kWide) : nullptr);
                if (more && dense)
                    block.advance();
                else if (more)
                    block.load_logits(n, p + kWide, kWide);
            }
        }
        for (Block<T, kNarrow> block(problem, buffer); p < stop; p += block.count) {
            block.load_logits(n, p, static_cast<int>(stop - p < kNarrow ? stop - p : kNarrow));
            kernel.run(block, n, p, static_cast<const T*>(nullptr));
        }
    }
}

// stats[i] = the sum of row i of sums[rows, kLanes]
IAL_INLINE void add_lanes(const double* sums, int64_t rows, double* stats) {
    for (int64_t i = 0; i < rows; ++i) {
        stats[i] = 0;
        for (int l = 0; l < kLanes; ++l) stats[i] += sums[i * kLanes + l];
    }
}

// stats[levels, kStats] of the range; sums: [levels, kStats, kLanes], zeros, a place for them on the way.
template <typename T>
IAL_TARGET void reduce(const Problem<T>& problem, int64_t n, int64_t begin, int64_t end,
                       typename Problem<T>::A* buffer, double* sums, double* stats, BadLabels* bad) {
    for_blocks(problem, n, begin, end, buffer, Reduce{sums, bad});
    add_lanes(sums, int64_t(problem.levels) * kStats, stats);
}

template <typename T>
IAL_TARGET void gradient(const Problem<T>& problem, int64_t n, int64_t begin, int64_t end,
                         typename Problem<T>::A* buffer, const typename Problem<T>::A* rows) {
    for_blocks(problem, n, begin, end, buffer, Gradient<typename Problem<T>::A>{rows});
#if IAL_X86_VECTORS
    _mm_sfence();  // streaming stores are ordered by nothing else
#endif
}

}  // namespace IAL_ISA
}  // namespace ial
