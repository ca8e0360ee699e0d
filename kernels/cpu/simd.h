/* AVX2 + FMA + F16C helpers. Every fused multiply-add is explicit, so that bits do not depend on the compiler. */
#pragma once

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

INLINE __m256 load_half8(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

INLINE __m256 abs_ps(__m256 x) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

INLINE float sum8(__m256 v) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

INLINE float max8(__m256 v) {
    __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}

/* Four sums, or four maxima, at the price of two: lane i is the reduction of v[i]. */
#define REDUCE4(name, op256, op128)                                                              \
    INLINE __m128 name(const __m256 v[4]) {                                                      \
        __m256 ab = op256(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));        \
        __m256 cd = op256(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));        \
        __m256 all = op256(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));     \
        return op128(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));                 \
    }
REDUCE4(sum8x4, _mm256_add_ps, _mm_add_ps)
REDUCE4(max8x4, _mm256_max_ps, _mm_max_ps)
#undef REDUCE4

/* 2^x, relative error 3e-7. Exactly 0 from x = -127 down (at -127 the polynomial is exactly 1 and the exponent field
 * becomes 0); NaN stays NaN, which is why x is the second operand of max. */
INLINE __m256 exp2_ps(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-127.0f), x);
    __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 f = _mm256_sub_ps(x, whole);
    __m256 p = _mm256_set1_ps(1.3333558e-3f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.6181291e-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.5504109e-2f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.4022651e-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.9314718e-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}

INLINE float exp2_scalar(float x) {
    return _mm256_cvtss_f32(exp2_ps(_mm256_set1_ps(x)));
}

/* log2 of a positive normal number, off by 2e-7 (of the result, or in absolute terms near 1); NaN and infinity stay. Own
 * code, so that bits do not depend on the C library. */
INLINE float log2_scalar(float x) {
    union {
        float number;
        uint32_t bits;
    } u = {x};
    if (u.bits >= 0x7F800000u) return x;
    const int32_t exponent = (int32_t)(u.bits - 0x3F3504F3u) >> 23; /* the rest is in [sqrt(1/2), sqrt(2)) */
    u.bits -= (uint32_t)exponent << 23;
    const float s = (u.number - 1.0f) / (u.number + 1.0f), t = s * s;
    /* 2 / ln 2 * atanh s */
    const float series = 2.88539008f + t * (0.961796694f + t * (0.577078016f + t * (0.412198583f + t * 0.320598898f)));
    return (float)exponent + s * series;
}

INLINE void transpose8(__m256 r[8]) {
    __m256 t[8], u[8];
    UNROLL for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
        u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

/* The dwords of packs(packs(x0, x1), packs(x2, x3)) in the order of x0, x1, x2, x3. */
INLINE __m256i unpacked_order(__m256i packed) {
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
