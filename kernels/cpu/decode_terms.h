/* Numbers as one 8-bit term or two, for vpmaddubsw. */
#pragma once

#include "simd.h"

#define TINY 1e-30f
#define Q_LEVELS(TERMS) ((TERMS) == 2 ? 32639.0f : 127.0f) /* 127 * 256 + 127 */
#define P_LEVELS(TERMS) ((TERMS) == 2 ? 65280.0f : 255.0f) /* 255 * 256 */

/* 32 numbers, x * inverse rounded, as one byte or as two byte terms: 256 high + low, where low is signed as x is. Each
 * pair of bytes is stored twice, to fill the 32 bits that a load can broadcast without a shuffle. */
INLINE void store_terms(const int TERMS, const __m256 x[4], __m256 inverse, const int is_signed, uint32_t high[16],
                        uint32_t low[16]) {
    __m256i i[4];
    UNROLL for (int k = 0; k < 4; k++) i[k] = _mm256_cvtps_epi32(_mm256_mul_ps(x[k], inverse));
    __m256i terms[2];
    if (TERMS == 1) {
        terms[0] = is_signed ? _mm256_packs_epi16(_mm256_packs_epi32(i[0], i[1]), _mm256_packs_epi32(i[2], i[3]))
                             : _mm256_packus_epi16(_mm256_packus_epi32(i[0], i[1]), _mm256_packus_epi32(i[2], i[3]));
    } else if (is_signed) {
        const __m256i half = _mm256_set1_epi16(128);
        __m256i a = _mm256_packs_epi32(i[0], i[1]), b = _mm256_packs_epi32(i[2], i[3]);
        terms[0] = _mm256_packs_epi16(_mm256_srai_epi16(_mm256_add_epi16(a, half), 8),
                                      _mm256_srai_epi16(_mm256_add_epi16(b, half), 8));
        terms[1] = _mm256_packs_epi16(_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8),
                                      _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    } else {
        const __m256i mask = _mm256_set1_epi16(255);
        __m256i a = _mm256_packus_epi32(i[0], i[1]), b = _mm256_packus_epi32(i[2], i[3]);
        terms[0] = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
        terms[1] = _mm256_packus_epi16(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
    }
    UNROLL for (int r = 0; r < TERMS; r++) {
        uint32_t *o = r ? low : high;
        __m256i lo = _mm256_unpacklo_epi16(terms[r], terms[r]), hi = _mm256_unpackhi_epi16(terms[r], terms[r]);
        _mm256_store_si256((__m256i *)o, _mm256_permute4x64_epi64(lo, 0xD8));
        _mm256_store_si256((__m256i *)(o + 8), _mm256_permute4x64_epi64(hi, 0xD8));
    }
}

INLINE __m256i broadcast_pair(const uint32_t *p) {
    return _mm256_set1_epi32((int)*p);
}

/* acc += products, 16-bit. Left to GCC, the sums are reassociated and all accumulators spill (1.2 times slower). */
INLINE void accumulate(__m256i *acc, __m256i products) {
    __asm__("vpaddw %1, %0, %0" : "+x"(*acc) : "x"(products));
}

/* 16 sums 256 * acc[0] + acc[1], or acc[0] of one term, as int32: lanes 0-3, 8-11 and lanes 4-7, 12-15. */
INLINE void join_terms(const int TERMS, const __m256i acc[2], __m256i out[2]) {
    const __m256i weights = _mm256_set1_epi32(TERMS == 2 ? 1 << 16 | 256 : 1);
    const __m256i low = TERMS == 2 ? acc[1] : acc[0]; /* times 0 for one term */
    out[0] = _mm256_madd_epi16(_mm256_unpacklo_epi16(acc[0], low), weights);
    out[1] = _mm256_madd_epi16(_mm256_unpackhi_epi16(acc[0], low), weights);
}

/* Planes of codes go through the products one by one or in pairs, as one code of four bits: half the products, but
 * 16-bit sums must be widened more often. */
#define TOP(PAIR) ((PAIR) ? 15 : 3)

/* 2-bit field i of the bytes of `low`, with that of `high` above it in a pair. */
INLINE __m256i field_codes(const int PAIR, __m256i low, __m256i high, const int i) {
    const __m256i c = _mm256_and_si256(i ? _mm256_srli_epi16(low, 2 * i) : low, _mm256_set1_epi8(3));
    if (!PAIR) return c;
    const __m256i h = i == 0 ? _mm256_slli_epi16(high, 2) : i == 1 ? high : _mm256_srli_epi16(high, 2 * i - 2);
    return _mm256_or_si256(c, _mm256_and_si256(h, _mm256_set1_epi8(12)));
}
