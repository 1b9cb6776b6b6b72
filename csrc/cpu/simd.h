// Vector helpers: exp, log, conversions, streaming stores, table look-ups and transposes.
// Compiled once per instruction set by dispatch.h.
namespace ial {
namespace IAL_ISA {

// exp(x) for x <= 0, within 1.5 ulp. Returns 0 below the smallest normal number, and NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln(2)/2, and exp(r) = 1 + r + r^2 q(r). q is the Chebyshev fit of degree 4
// (float: relative error 1.0e-8) or 9 (double: 1.7e-17). Adding `shift` = 1.5 * 2^mantissa_bits + bias rounds
// to the integer n. It leaves n + bias, the exponent of 2^n, in the low bits. Below the range, n stops at
// -bias, where that exponent means 0. In float, n times the error of ln 2 (1.9e-9) stays below half an ulp
// for x > -20. Smaller exponentials hardly change a sum that contains a 1.
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

// log(s) for s >= 1 or NaN. s = 2^e m with m in [sqrt(1/2), sqrt(2)).
// Float: log(1 + f) = f - f^2/2 + f^3 q(f). q is the Chebyshev fit of degree 7 (relative error 2.0e-8). A
// division would take as long as six multiplications.
// Double: with z = (m - 1) / (m + 1), |z| <= 0.172, log(m) = 2 (z + z^3/3 + z^5/5 + ...). The series is cut
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

// Half precision uses F16C where the instruction set has it, because compilers do not vectorise the
// conversion.
#if IAL_X86_VECTORS
IAL_INLINE void widen_lanes(const c10::Half* from, float* to, int lanes) {
    int j = 0;
#if IAL_X86_VECTORS == 512
    for (; j + 16 <= lanes; j += 16) {  // one 512-bit load would wait for two 256-bit stores
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + j));
        _mm512_storeu_ps(to + j, _mm512_maskz_cvtph_ps(0xffff, half));
    }
#endif
    for (; j < lanes; j += 8)
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

// narrow_lanes with streaming stores, for data that is too large to stay in the caches until it is read. A
// streaming store does not read the line first.
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

// to[j] = values[index[j]], from `size` <= kMaxTable values of 32 bits. Arbitrary if index[j] is out of
// range.
#if IAL_X86_VECTORS == 512
template <typename V, typename U>
IAL_INLINE void look_up_table(const V* values, int size, const int32_t* index, U* to, int lanes) {
    static_assert(sizeof(V) == 4 && sizeof(U) == 4);
    const uint32_t present = ~0u >> (kMaxTable - size);
    const __m512i low = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(present), values);
    const __m512i high = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(present >> 16), values + 16);
    for (int j = 0; j < lanes; j += 16)
        _mm512_storeu_si512(to + j, _mm512_permutex2var_epi32(low, _mm512_loadu_si512(index + j), high));
}
#endif

IAL_INLINE bool aligned(const void* address) {
    return reinterpret_cast<uintptr_t>(address) % kStreamBytes == 0;
}

// to[j * to_stride + i] = from[i * from_stride + j] for kTile x kTile numbers. In channels_last logits the
// classes of a pixel are contiguous. Moving them one by one would take longer than all the arithmetic on
// them.
#if IAL_X86_VECTORS
IAL_INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    __m256 v[kTile];  // the first four numbers of rows i and i + 4, then their last four
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

}  // namespace IAL_ISA
}  // namespace ial
