/* Scores of packed keys: the query, with the K scale folded in, times codes as they are. */
#pragma once

#include "decode_state.h"
#include "decode_terms.h"
#include "scales.h"

/* Pairs of neighbouring channels of a query, filled up to whole registers. */
#define QUERY_PAIRS(D) (((D) + 31) / 32 * 16)

/* Queries of one K group as byte terms, what one step of them is worth, and what the zero points add to a score. */
struct folded_queries {
    ALIGNED uint32_t terms[2][HEADS][MAX_HEAD_DIM / 2];
    ALIGNED uint32_t boosted[2][HEADS][MAX_HEAD_DIM / 2]; /* those of boosted channels again, in their order */
    ALIGNED float factor[4], bias[4];
};

/* The folded query at the boosted channels, in byte terms. */
INLINE void split_boosted(const int TERMS, const struct tensor_format *f, const uint8_t *page, const float *folded,
                          __m256 inverse, uint32_t *high, uint32_t *low) {
    ALIGNED float x[MAX_HEAD_DIM];
    const int count = (int)f->boosted, filled = (count + 31) / 32 * 32;
    for (int i = 0; i < count; i++) x[i] = folded[page[f->channels + i]];
    for (int i = count; i < filled; i++) x[i] = 0.0f;
    for (int i = 0; i < filled; i += 32) {
        const __m256 four[4] = {_mm256_load_ps(x + i), _mm256_load_ps(x + i + 8), _mm256_load_ps(x + i + 16),
                                _mm256_load_ps(x + i + 24)};
        store_terms(TERMS, four, inverse, 1, high + i / 2, low + i / 2);
    }
}

/* Folds a K group's scales and zero points into the queries of GB heads, and splits them. */
INLINE void fold_queries(const int D, const int GB, const int TERMS, const int BOOSTED, const struct tensor_format *f,
                         const uint8_t *page, int group, const float *query, struct folded_queries *q) {
    ALIGNED float zero_factors[MAX_HEAD_DIM];
    if (BOOSTED) channel_zero_factors(D, f, page, zero_factors);
    ALIGNED __m256 folded[HEADS][QUERY_PAIRS(MAX_HEAD_DIM) / 4];
    __m256 most[HEADS], shift[HEADS];
    UNROLL for (int g = 0; g < HEADS; g++) most[g] = shift[g] = _mm256_setzero_ps();
    for (int i = 0; i < D / 8; i++) {
        const __m256 zero = BOOSTED ? _mm256_load_ps(zero_factors + 8 * i) : _mm256_set1_ps(zero_factor(f));
        const __m256 s = load_scales(f, page, group * D + 8 * i), z = load_zeros(f, page, group * D + 8 * i, s, zero);
        UNROLL for (int g = 0; g < GB; g++) {
            const __m256 x = _mm256_load_ps(query + g * D + 8 * i);
            folded[g][i] = _mm256_mul_ps(x, s);
            shift[g] = _mm256_fmadd_ps(x, z, shift[g]);
            most[g] = _mm256_max_ps(most[g], abs_ps(folded[g][i]));
        }
    }
    for (int i = D / 8; i < QUERY_PAIRS(D) / 4; i++)
        UNROLL for (int g = 0; g < GB; g++) folded[g][i] = _mm256_setzero_ps();
    ALIGNED float inverse[4];
    const __m128 peak = _mm_max_ps(max8x4(most), _mm_set1_ps(TINY));
    _mm_store_ps(inverse, _mm_div_ps(_mm_set1_ps(Q_LEVELS(TERMS)), peak));
    _mm_store_ps(q->factor, _mm_mul_ps(peak, _mm_set1_ps(1.0f / (FOLD * Q_LEVELS(TERMS)))));
    _mm_store_ps(q->bias, sum8x4(shift));
    UNROLL for (int g = 0; g < GB; g++) {
        const __m256 inv = _mm256_set1_ps(inverse[g]);
        for (int i = 0; i < QUERY_PAIRS(D) / 16; i++)
            store_terms(TERMS, folded[g] + 4 * i, inv, 1, q->terms[0][g] + 16 * i, q->terms[1][g] + 16 * i);
        if (BOOSTED)
            split_boosted(TERMS, f, page, (const float *)folded[g], inv, q->boosted[0][g], q->boosted[1][g]);
    }
}

/* Adds the products of some words and fields at 16 tokens to the heads' totals, times 4^plane. */
INLINE void add_run(const int D, const int GB, const int TERMS, const int PAIR, const uint8_t *codes, int plane,
                    const int field, const int fields, int begin, int end, const struct folded_queries *q,
                    __m256i total[HEADS][2]) {
    __m256i acc[HEADS][2];
    UNROLL for (int g = 0; g < GB; g++) acc[g][0] = acc[g][1] = _mm256_setzero_si256();
    for (int j = begin; j < end; j++) {
        const uint8_t *row = codes + 2 * PAGE * j;
        const __m256i low = _mm256_loadu_si256((const __m256i *)row);
        const __m256i high = PAIR ? _mm256_loadu_si256((const __m256i *)(row + PLANE_BYTES(D))) : low;
        UNROLL for (int i = field; i < field + fields; i++) {
            const __m256i c = field_codes(PAIR, low, high, i);
            UNROLL for (int g = 0; g < GB; g++)
                UNROLL for (int r = 0; r < TERMS; r++)
                    accumulate(&acc[g][r], _mm256_maddubs_epi16(c, broadcast_pair(&q->terms[r][g][D / 8 * i + j])));
        }
    }
    UNROLL for (int g = 0; g < GB; g++) {
        __m256i sums[2];
        join_terms(TERMS, acc[g], sums);
        UNROLL for (int k = 0; k < 2; k++)
            total[g][k] = _mm256_add_epi32(total[g][k], _mm256_slli_epi32(sums[k], 2 * plane));
    }
}

/* The same for one whole plane, or a pair. */
INLINE void add_products(const int D, const int GB, const int TERMS, const int PAIR, const uint8_t *codes, int plane,
                         const struct folded_queries *q, __m256i total[HEADS][2]) {
    const int words = D / 8;
    /* Products before a 16-bit sum must be widened: each is up to 2 * 128 * TOP. */
    const int most = 32767 / (2 * 128 * TOP(PAIR));
    const int fields = 4 * words <= most ? 4 : 2 * words <= most ? 2 : 1;
    const int runs = (words + most - 1) / most, run = (words + runs - 1) / runs;
    UNROLL for (int field = 0; field < 4; field += fields) {
        if (runs == 1) {
            add_run(D, GB, TERMS, PAIR, codes, plane, field, fields, 0, words, q, total);
        } else {
            for (int begin = 0; begin < words; begin += run)
                add_run(D, GB, TERMS, PAIR, codes, plane, field, fields, begin,
                        begin + run < words ? begin + run : words, q, total);
        }
    }
}

/* The highest plane of the boosted channels at 16 tokens: `words` rows, FIELDS fields from `field` on. */
INLINE void add_boosted(const int GB, const int TERMS, const int FIELDS, const uint8_t *codes, int words, int plane,
                        int field, const struct folded_queries *q, __m256i total[HEADS][2]) {
    __m256i acc[HEADS][2];
    UNROLL for (int g = 0; g < GB; g++) acc[g][0] = acc[g][1] = _mm256_setzero_si256();
    for (int j = 0; j < words; j++) {
        const __m256i row = _mm256_loadu_si256((const __m256i *)(codes + 2 * PAGE * j));
        UNROLL for (int i = 0; i < FIELDS; i++) {
            const __m256i shifted = _mm256_srl_epi16(row, _mm_cvtsi32_si128(2 * (field + i)));
            const __m256i c = _mm256_and_si256(shifted, _mm256_set1_epi8(3));
            UNROLL for (int g = 0; g < GB; g++)
                UNROLL for (int r = 0; r < TERMS; r++)
                    accumulate(&acc[g][r],
                               _mm256_maddubs_epi16(c, broadcast_pair(&q->boosted[r][g][words * (field + i) + j])));
        }
    }
    UNROLL for (int g = 0; g < GB; g++) {
        __m256i sums[2];
        join_terms(TERMS, acc[g], sums);
        UNROLL for (int k = 0; k < 2; k++)
            total[g][k] = _mm256_add_epi32(total[g][k], _mm256_slli_epi32(sums[k], 2 * plane));
    }
}

/* Scores of 16 tokens for GB heads, which are PAGE apart. `codes`: these tokens in the lowest plane; `boost`: in the
 * boosted channels' plane. */
INLINE void score_codes(const int D, const int GB, const int TERMS, const uint8_t *codes, const uint8_t *boost,
                        int planes, int boosted, const struct folded_queries *q, float *scores) {
    __m256i total[HEADS][2];
    UNROLL for (int g = 0; g < GB; g++) total[g][0] = total[g][1] = _mm256_setzero_si256();
    int plane = 0;
    for (; plane + 2 <= planes; plane += 2)
        add_products(D, GB, TERMS, 1, codes + plane * PLANE_BYTES(D), plane, q, total);
    for (; plane < planes; plane++) add_products(D, GB, TERMS, 0, codes + plane * PLANE_BYTES(D), plane, q, total);
    if (boosted) {
        const int words = boosted / 8;
        if (4 * words * 2 * 128 * 3 < 32768) { /* before a 16-bit sum must be widened */
            add_boosted(GB, TERMS, 4, boost, words, planes, 0, q, total);
        } else {
            for (int field = 0; field < 4; field++) add_boosted(GB, TERMS, 1, boost, words, planes, field, q, total);
        }
    }
    UNROLL for (int g = 0; g < GB; g++) {
        const __m256 factor = _mm256_set1_ps(q->factor[g]), bias = _mm256_set1_ps(q->bias[g]);
        __m256i low = _mm256_permute2x128_si256(total[g][0], total[g][1], 0x20);
        __m256i high = _mm256_permute2x128_si256(total[g][0], total[g][1], 0x31);
        _mm256_store_ps(scores + g * PAGE, _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), factor, bias));
        _mm256_store_ps(scores + g * PAGE + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), factor, bias));
    }
}

/* Scores of fp16 keys [32 tokens, D]. */
INLINE void score_half(const int D, const int GB, const uint16_t *keys, const float *query,
                       float scores[HEADS][PAGE]) {
    for (int t = 0; t < PAGE; t++) {
        __m256 dot[HEADS];
        UNROLL for (int g = 0; g < HEADS; g++) dot[g] = _mm256_setzero_ps();
        for (int i = 0; i < D; i += 8) {
            const __m256 k = load_half8(keys + t * D + i);
            UNROLL for (int g = 0; g < GB; g++) dot[g] = _mm256_fmadd_ps(_mm256_load_ps(query + g * D + i), k, dot[g]);
        }
        ALIGNED float score[4];
        _mm_store_ps(score, sum8x4(dot));
        UNROLL for (int g = 0; g < GB; g++) scores[g][t] = score[g];
    }
}

/* Scores of a page's tile for GB heads. `q` is kept from tile to tile: a K group may span two of them. */
INLINE void tile_scores(const int D, const int GB, const int TERMS, const struct page_format *f, const uint8_t *page,
                        int tile, const float *query, struct folded_queries *q, float scores[HEADS][PAGE]) {
    if (f->key.bits == 16) {
        score_half(D, GB, (const uint16_t *)(page + f->key.codes) + tile * PAGE * D, query, scores);
        return;
    }
    const struct tensor_format *k = &f->key;
    const int planes = planes_of(k), group = (int)k->group, boosted = (int)k->boosted;
    const uint8_t *codes = page + k->codes + tile * planes * PLANE_BYTES(D);
    const uint8_t *boost = page + k->boost + tile * PLANE_BYTES(boosted);
    for (int half = 0; half < PAGE; half += 16) {
        const int token = tile * PAGE + half;
        if ((token & (group - 1)) == 0) {
            if (boosted)
                fold_queries(D, GB, TERMS, 1, k, page, token / group, query, q);
            else
                fold_queries(D, GB, TERMS, 0, k, page, token / group, query, q);
        }
        score_codes(D, GB, TERMS, codes + 2 * half, boost + 2 * half, planes, boosted, q, scores[0] + half);
    }
}
