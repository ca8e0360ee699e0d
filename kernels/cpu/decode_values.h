/* Weighted sums of packed values: probabilities, with the V scale folded in, times codes as they are. */
#pragma once

#include "decode_state.h"
#include "decode_terms.h"
#include "scales.h"

/* A row of V codes at a pair of tokens, byte by byte: D / 2 bytes in quads of 4 channels (8 bytes). Unless quads come
 * in fours, the first three follow again, so that 16 channels are one load wherever they begin. */
#define ROW_BYTES(D) ((D) % 64 ? ((D) / 2 + 24 + 31) / 32 * 32 : (D) / 2)

INLINE void interleave_values(const int D, const uint8_t *codes, uint8_t *rows) {
    for (int t = 0; t < PAGE / 2; t++) {
        const uint8_t *even = codes + 2 * t * (D / 4), *odd = even + D / 4;
        uint8_t *row = rows + t * ROW_BYTES(D);
        UNROLL for (int b = 0; b + 16 <= D / 4; b += 16) {
            const __m128i x = _mm_loadu_si128((const __m128i *)(even + b));
            const __m128i y = _mm_loadu_si128((const __m128i *)(odd + b));
            const __m256i both = _mm256_set_m128i(_mm_unpackhi_epi8(x, y), _mm_unpacklo_epi8(x, y));
            /* One store: loads of 32 bytes stall on two halves. */
            _mm256_store_si256((__m256i *)(row + 2 * b), both);
        }
        const int done = D / 4 / 16 * 16;
        if (D / 4 - done == 8) {
            const __m128i x = _mm_loadl_epi64((const __m128i *)(even + done));
            const __m128i y = _mm_loadl_epi64((const __m128i *)(odd + done));
            _mm_store_si128((__m128i *)(row + 2 * done), _mm_unpacklo_epi8(x, y));
        }
        if (D / 4 - done == 4) {
            int32_t x, y;
            memcpy(&x, even + done, 4);
            memcpy(&y, odd + done, 4);
            const __m128i both = _mm_unpacklo_epi8(_mm_cvtsi32_si128(x), _mm_cvtsi32_si128(y));
            _mm_storel_epi64((__m128i *)(row + 2 * done), both);
        }
        if (D % 64)
            UNROLL for (int i = 0; i < 3; i++) memcpy(row + D / 2 + 8 * i, row + 8 * i, 8);
    }
}

/* Codes of channels 16 j .. 16 j + 15 at a pair of tokens, of one plane's row or of a pair's. Its four quads lie in one
 * field unless D / 16 is no multiple of four. */
INLINE __m256i channel_codes(const int D, const int PAIR, const uint8_t *low_row, const uint8_t *high_row,
                             const int j) {
    const int quads = D / 16, first = 4 * j, at = first % quads * 8;
    __m256i low = _mm256_loadu_si256((const __m256i *)(low_row + at));
    __m256i high = PAIR ? _mm256_loadu_si256((const __m256i *)(high_row + at)) : low;
    const int f0 = first / quads, f1 = (first + 1) / quads, f2 = (first + 2) / quads, f3 = (first + 3) / quads;
    if (f0 == f3) return field_codes(PAIR, low, high, f0);
    const __m256i shifts = _mm256_setr_epi64x(2 * f0, 2 * f1, 2 * f2, 2 * f3);
    low = _mm256_srlv_epi64(low, shifts);
    if (PAIR) high = _mm256_srlv_epi64(high, shifts);
    return field_codes(PAIR, low, high, 0);
}

/* Probabilities times V scale as byte terms, and what one step of them is worth. */
struct weights {
    ALIGNED uint32_t terms[MAX_VALUE_GROUPS][2][HEADS][PAGE / 2];
    ALIGNED float factor[4];
};

/* Folds the V scale into probabilities; zero points join zero_sum. */
INLINE void fold_probabilities(const int GB, const int TERMS, const struct tensor_format *f, int groups,
                               const uint8_t *page, int tile, float probabilities[HEADS][PAGE], struct state *s,
                               struct weights *weights) {
    ALIGNED float inverse[4];
    ALIGNED __m256 folded[MAX_VALUE_GROUPS][HEADS][4];
    __m256 most[HEADS];
    UNROLL for (int g = 0; g < HEADS; g++) most[g] = _mm256_setzero_ps();
    for (int n = 0; n < groups; n++) {
        __m256 scales[4], zeros[4];
        UNROLL for (int k = 0; k < 4; k++) {
            const int first = (tile * groups + n) * PAGE + 8 * k;
            scales[k] = load_scales(f, page, first);
            zeros[k] = load_zeros(f, page, first, scales[k], _mm256_set1_ps(zero_factor(f)));
        }
        UNROLL for (int g = 0; g < GB; g++) {
            __m256 sum = s->zero_sum[g][n];
            UNROLL for (int k = 0; k < 4; k++) {
                const __m256 p = _mm256_load_ps(probabilities[g] + 8 * k);
                folded[n][g][k] = _mm256_mul_ps(p, scales[k]);
                sum = _mm256_fmadd_ps(p, zeros[k], sum);
                most[g] = _mm256_max_ps(most[g], folded[n][g][k]);
            }
            s->zero_sum[g][n] = sum;
        }
    }
    const __m128 peak = _mm_max_ps(max8x4(most), _mm_set1_ps(TINY));
    _mm_store_ps(inverse, _mm_div_ps(_mm_set1_ps(P_LEVELS(TERMS)), peak));
    _mm_store_ps(weights->factor, _mm_mul_ps(peak, _mm_set1_ps(1.0f / (FOLD * P_LEVELS(TERMS)))));
    for (int n = 0; n < groups; n++)
        UNROLL for (int g = 0; g < GB; g++)
            store_terms(TERMS, folded[n][g], _mm256_set1_ps(inverse[g]), 0, weights->terms[n][0][g],
                        weights->terms[n][1][g]);
}

/* Sums of 16 channels over some pairs of tokens, in the order of join_terms. */
INLINE void sum_run(const int D, const int GB, const int TERMS, const int PAIR, const uint8_t *low, const uint8_t *high,
                    const int j, const uint32_t (*terms)[HEADS][PAGE / 2], int begin, int end,
                    __m256i sums[HEADS][2]) {
    __m256i acc[HEADS][2];
    UNROLL for (int g = 0; g < GB; g++) acc[g][0] = acc[g][1] = _mm256_setzero_si256();
    for (int t = begin; t < end; t++) {
        const __m256i c = channel_codes(D, PAIR, low + t * ROW_BYTES(D), high + t * ROW_BYTES(D), j);
        UNROLL for (int g = 0; g < GB; g++)
            UNROLL for (int r = 0; r < TERMS; r++)
                accumulate(&acc[g][r], _mm256_maddubs_epi16(broadcast_pair(&terms[r][g][t]), c));
    }
    UNROLL for (int g = 0; g < GB; g++) join_terms(TERMS, acc[g], sums[g]);
}

/* Adds one plane of a tile's V, or a pair, weighted, to the heads' outputs. `shift`: log2 of the 16-channel columns of
 * a group. */
INLINE void add_codes(const int D, const int GB, const int TERMS, const int PAIR, const uint8_t *codes, int plane,
                      int shift, const struct weights *weights, struct state *s) {
    ALIGNED uint8_t rows[1 + PAIR][PAGE / 2 * ROW_BYTES(D)];
    interleave_values(D, codes, rows[0]);
    if (PAIR) interleave_values(D, codes + PLANE_BYTES(D), rows[PAIR]);
    UNROLL for (int j = 0; j < D / 16; j++) {
        const uint32_t(*terms)[HEADS][PAGE / 2] = weights->terms[j >> shift];
        __m256i total[HEADS][2];
        /* Pairs of tokens before a 16-bit sum must be widened: each is up to 2 * 255 * TOP. */
        if (!PAIR) {
            sum_run(D, GB, TERMS, PAIR, rows[0], rows[0], j, terms, 0, PAGE / 2, total);
        } else {
            UNROLL for (int g = 0; g < GB; g++) total[g][0] = total[g][1] = _mm256_setzero_si256();
            for (int begin = 0; begin < PAGE / 2; begin += 4) {
                __m256i sums[HEADS][2];
                sum_run(D, GB, TERMS, PAIR, rows[0], rows[PAIR], j, terms, begin, begin + 4, sums);
                UNROLL for (int g = 0; g < GB; g++)
                    UNROLL for (int k = 0; k < 2; k++) total[g][k] = _mm256_add_epi32(total[g][k], sums[g][k]);
            }
        }
        UNROLL for (int g = 0; g < GB; g++) {
            const __m256 factor = _mm256_set1_ps(weights->factor[g] * (float)(1 << 2 * plane));
            float *o = s->out[g] + 16 * j;
            UNROLL for (int k = 0; k < 2; k++)
                _mm256_store_ps(o + 8 * k,
                                _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[g][k]), factor, _mm256_load_ps(o + 8 * k)));
        }
    }
}

/* Adds fp16 values [32 tokens, D], weighted. */
INLINE void add_half(const int D, const int GB, const uint16_t *values, float probabilities[HEADS][PAGE],
                     struct state *s) {
    for (int i = 0; i < D; i += 16) {
        __m256 acc[HEADS][2];
        UNROLL for (int g = 0; g < GB; g++)
            UNROLL for (int k = 0; k < 2; k++) acc[g][k] = _mm256_load_ps(s->out[g] + i + 8 * k);
        for (int t = 0; t < PAGE; t++) {
            /* Channels 0-3, 8-11 and 4-7, 12-15: the order of join_terms. */
            const __m256i v = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)(values + t * D + i)), 0xD8);
            const __m256 v0 = _mm256_cvtph_ps(_mm256_castsi256_si128(v));
            const __m256 v1 = _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
            UNROLL for (int g = 0; g < GB; g++) {
                const __m256 p = _mm256_set1_ps(probabilities[g][t]);
                acc[g][0] = _mm256_fmadd_ps(p, v0, acc[g][0]);
                acc[g][1] = _mm256_fmadd_ps(p, v1, acc[g][1]);
            }
        }
        UNROLL for (int g = 0; g < GB; g++)
            UNROLL for (int k = 0; k < 2; k++) _mm256_store_ps(s->out[g] + i + 8 * k, acc[g][k]);
    }
}

/* Adds a page's tile of V under its scores, which become probabilities. */
INLINE void add_tile(const int D, const int GB, const int TERMS, const struct page_format *f, const uint8_t *page,
                     int tile, int shift, float scores[HEADS][PAGE], struct state *s, struct weights *weights) {
    UNROLL for (int g = 0; g < GB; g++) {
        __m256 p[4];
        UNROLL for (int k = 0; k < 4; k++) p[k] = _mm256_load_ps(scores[g] + 8 * k);
        to_probabilities(D, s, g, p);
        UNROLL for (int k = 0; k < 4; k++) _mm256_store_ps(scores[g] + 8 * k, p[k]);
    }
    if (f->value.bits == 16) {
        add_half(D, GB, (const uint16_t *)(page + f->value.codes) + tile * PAGE * D, scores, s);
        return;
    }
    const int planes = planes_of(&f->value);
    fold_probabilities(GB, TERMS, &f->value, value_groups(f, D), page, tile, scores, s, weights);
    const uint8_t *codes = page + f->value.codes + tile * planes * PLANE_BYTES(D);
    int plane = 0;
    for (; plane + 2 <= planes; plane += 2)
        add_codes(D, GB, TERMS, 1, codes + plane * PLANE_BYTES(D), plane, shift, weights, s);
    for (; plane < planes; plane++)
        add_codes(D, GB, TERMS, 0, codes + plane * PLANE_BYTES(D), plane, shift, weights, s);
}
