/* Paged fused dequant-attention for decode.
 *
 * Codes are multiplied as they are, by vpmaddubsw: scales are folded into the query (K) and into the probabilities (V),
 * which are then split into TERMS 8-bit terms: two (error about 2e-4), or one, which is faster (about 4e-2). Zero
 * points become a bias of the score and a sum of probabilities. K and V never exist in floating point.
 *
 * A context is cut into pieces that depend on its own length alone: first the fp16 tokens (sinks and tail), then
 * PIECE_PAGES packed pages each. A work item is a piece of one KV head, for all its query heads; whoever finishes the
 * last piece of a head merges them in order. So a result has the same bits whatever else is in the batch and however
 * many threads run. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "library.h"
#include "page.h"
#include "parallel.h"
#include "simd.h"

#define PIECE_PAGES 16
/* Page-heads that one thread computes in less time (15 us) than a second thread may take to join. */
#define SERIAL_WORK 128
#define HEADS 4 /* query heads a register block */
#define MAX_HALF_TOKENS (1024 + 16)
#define LOG2E 1.44269504f
#define LEAST_SCORE (-1e30f) /* below every score, and finite: a difference of two is not NaN */
/* The running maximum follows only when a score exceeds it by this much (as a power of 2): probabilities grow to 256
 * and rescaling becomes rare. */
#define LAZY 8.0f
#define TINY 1e-30f
#define Q_LEVELS(TERMS) ((TERMS) == 2 ? 32639.0f : 127.0f) /* 127 * 256 + 127 */
#define P_LEVELS(TERMS) ((TERMS) == 2 ? 65280.0f : 255.0f) /* 255 * 256 */

/* Strides count elements of their array: bytes for the pool, else fp16 or int32. Pool, sinks and tails point at the
 * layer. */
struct decode_args {
    const float *query; /* [B, Hq, D] */
    float *out;         /* [B, Hq, D] */
    const uint8_t *pool;
    const uint16_t *sinks, *tails;
    const int32_t *block_tables, *num_blocks, *slots, *tail_lens;
    int64_t pool_blocks, pool_block_stride, pool_head_stride;
    int64_t num_slots, sinks_slot_stride, sinks_head_stride;
    int64_t tails_slot_stride, tails_value_offset, tails_head_stride;
    int64_t table_stride, batch, kv_heads, group, head_dim, sink_tokens, block_size, threads, terms;
    float scale;
};

struct decode_call {
    const struct decode_args *args;
    int64_t *first_piece;  /* [B + 1]: running sum of the sequences' pieces */
    _Atomic int *unfinished; /* [B, H]: pieces to go */
    float *partials;       /* [piece, H, group, D + 2]: unnormalised output, maximum, sum */
};

/* A piece's running softmax for a register block of heads. */
struct state {
    ALIGNED float out[HEADS][MAX_HEAD_DIM];
    ALIGNED __m256 zero_sum[HEADS][MAX_HEAD_DIM / GROUP]; /* probability * V zero point, one lane in eight tokens */
    ALIGNED __m256 sum[HEADS];
    float max[HEADS];
};

INLINE void reset(struct state *s) {
    memset(s, 0, sizeof *s);
    for (int g = 0; g < HEADS; g++) s->max[g] = LEAST_SCORE;
}

/* Raises a head's maximum to `max` and rescales what was summed under the old one. */
INLINE void raise_max(const int D, struct state *s, int g, float max) {
    const __m256 factor = _mm256_set1_ps(exp2_scalar(s->max[g] - max));
    for (int i = 0; i < D; i += 8)
        _mm256_store_ps(s->out[g] + i, _mm256_mul_ps(_mm256_load_ps(s->out[g] + i), factor));
    for (int n = 0; n < D / GROUP; n++) s->zero_sum[g][n] = _mm256_mul_ps(s->zero_sum[g][n], factor);
    s->sum[g] = _mm256_mul_ps(s->sum[g], factor);
    s->max[g] = max;
}

/* Scores of 32 tokens (x[4], in powers of 2) to probabilities; updates maximum and sum. */
INLINE void to_probabilities(const int D, struct state *s, int g, __m256 x[4]) {
    __m256 most = _mm256_max_ps(_mm256_max_ps(x[0], x[1]), _mm256_max_ps(x[2], x[3]));
    if (_mm256_movemask_ps(_mm256_cmp_ps(most, _mm256_set1_ps(s->max[g] + LAZY), _CMP_GT_OQ)))
        raise_max(D, s, g, max8(most));
    const __m256 max = _mm256_set1_ps(s->max[g]);
    UNROLL for (int k = 0; k < 4; k++) x[k] = exp2_ps(_mm256_sub_ps(x[k], max));
    s->sum[g] = _mm256_add_ps(s->sum[g], _mm256_add_ps(_mm256_add_ps(x[0], x[1]), _mm256_add_ps(x[2], x[3])));
}

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

/* Folds the page's K scale and zero point into the queries of GB heads, and splits them. */
INLINE void fold_queries(const int D, const int GB, const int TERMS, const uint8_t *page, const float *query,
                         uint32_t terms[2][HEADS][MAX_HEAD_DIM / 2], float factor[4], float bias[4]) {
    const uint16_t *scale = (const uint16_t *)(page + K_SCALE(D)), *zero = (const uint16_t *)(page + K_ZERO(D));
    ALIGNED __m256 folded[HEADS][MAX_HEAD_DIM / 8];
    __m256 most[HEADS], shift[HEADS];
    UNROLL for (int g = 0; g < HEADS; g++) most[g] = shift[g] = _mm256_setzero_ps();
    for (int i = 0; i < D / 8; i++) {
        const __m256 s = load_half8(scale + 8 * i), z = _mm256_add_ps(load_half8(zero + 8 * i), s);
        UNROLL for (int g = 0; g < GB; g++) {
            __m256 q = _mm256_load_ps(query + g * D + 8 * i);
            folded[g][i] = _mm256_mul_ps(q, s);
            shift[g] = _mm256_fmadd_ps(q, z, shift[g]);
            most[g] = _mm256_max_ps(most[g], abs_ps(folded[g][i]));
        }
    }
    ALIGNED float inverse[4];
    const __m128 peak = _mm_max_ps(max8x4(most), _mm_set1_ps(TINY));
    _mm_store_ps(inverse, _mm_div_ps(_mm_set1_ps(Q_LEVELS(TERMS)), peak));
    _mm_store_ps(factor, _mm_mul_ps(peak, _mm_set1_ps(1.0f / (FOLD * Q_LEVELS(TERMS)))));
    _mm_store_ps(bias, sum8x4(shift));
    UNROLL for (int g = 0; g < GB; g++) {
        const __m256 inv = _mm256_set1_ps(inverse[g]);
        for (int i = 0; i < D / 32; i++)
            store_terms(TERMS, folded[g] + 4 * i, inv, 1, terms[0][g] + 16 * i, terms[1][g] + 16 * i);
    }
}

/* Scores of the page's 32 tokens for GB heads. */
INLINE void page_scores(const int D, const int GB, const int TERMS, const uint8_t *page, uint32_t terms[2][HEADS][MAX_HEAD_DIM / 2],
                        const float factor[4], const float bias[4], float scores[HEADS][PAGE]) {
    const int words = D / 8;
    /* Planes before a 16-bit sum must be widened: planes * words * 2 * 128 * 3 < 2^15. */
    const int planes = D <= 64 ? 4 : 2;
    const __m256i field = _mm256_set1_epi8(3);
    for (int half = 0; half < 2; half++) {
        __m256i total[HEADS][2];
        UNROLL for (int plane = 0; plane < 4; plane += planes) {
            __m256i acc[HEADS][2];
            UNROLL for (int g = 0; g < GB; g++) acc[g][0] = acc[g][1] = _mm256_setzero_si256();
            for (int j = 0; j < words; j++) {
                const __m256i w = _mm256_loadu_si256((const __m256i *)(page + K_CODES(D) + 64 * j + 32 * half));
                UNROLL for (int i = plane; i < plane + planes; i++) {
                    const __m256i c = _mm256_and_si256(i ? _mm256_srli_epi16(w, 2 * i) : w, field);
                    UNROLL for (int g = 0; g < GB; g++)
                        UNROLL for (int r = 0; r < TERMS; r++)
                            accumulate(&acc[g][r],
                                       _mm256_maddubs_epi16(c, broadcast_pair(&terms[r][g][words * i + j])));
                }
            }
            UNROLL for (int g = 0; g < GB; g++) {
                __m256i sums[2];
                join_terms(TERMS, acc[g], sums);
                UNROLL for (int k = 0; k < 2; k++)
                    total[g][k] = plane ? _mm256_add_epi32(total[g][k], sums[k]) : sums[k];
            }
        }
        UNROLL for (int g = 0; g < GB; g++) {
            const __m256 f = _mm256_set1_ps(factor[g]), b = _mm256_set1_ps(bias[g]);
            __m256i low = _mm256_permute2x128_si256(total[g][0], total[g][1], 0x20);
            __m256i high = _mm256_permute2x128_si256(total[g][0], total[g][1], 0x31);
            _mm256_store_ps(scores[g] + 16 * half, _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), f, b));
            _mm256_store_ps(scores[g] + 16 * half + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), f, b));
        }
    }
}

/* The V codes of tokens 2t and 2t + 1, byte by byte, as 128-bit lanes of 8 planar bytes: register r of a row holds the
 * lanes that channel_codes() wants side by side. */
#define ROW_REGISTERS(D) ((D) == 96 ? 3 : (D) == 128 ? 2 : 1)

INLINE void interleave_values(const int D, const uint8_t *codes, __m256i rows[PAGE / 2][3]) {
    for (int t = 0; t < PAGE / 2; t++) {
        const uint8_t *even = codes + 2 * t * (D / 4), *odd = even + D / 4;
        __m128i lane[4];
        UNROLL for (int k = 0; k < D / 32; k++)
            lane[k] = _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i *)(even + 8 * k)),
                                        _mm_loadl_epi64((const __m128i *)(odd + 8 * k)));
        if (D == 32) {
            rows[t][0] = _mm256_set_m128i(lane[0], lane[0]);
        } else if (D == 96) {
            rows[t][0] = _mm256_set_m128i(lane[1], lane[0]);
            rows[t][1] = _mm256_set_m128i(lane[0], lane[2]);
            rows[t][2] = _mm256_set_m128i(lane[2], lane[1]);
        } else {
            UNROLL for (int k = 0; k < D / 64; k++) rows[t][k] = _mm256_set_m128i(lane[2 * k + 1], lane[2 * k]);
        }
    }
}

/* Codes of channels 16 j .. 16 j + 15 at a pair of tokens. Its two lanes lie in the same plane unless D / 4 is an odd
 * number of lanes. */
INLINE __m256i channel_codes(const int D, const __m256i row[3], const int j) {
    const int lanes = D / 32, even = 2 * (2 * j / lanes), odd = 2 * ((2 * j + 1) / lanes);
    const __m256i v = row[j % ROW_REGISTERS(D)];
    const __m256i shifts = _mm256_setr_epi32(even, even, even, even, odd, odd, odd, odd);
    const __m256i shifted = even != odd ? _mm256_srlv_epi32(v, shifts) : even ? _mm256_srli_epi16(v, even) : v;
    return _mm256_and_si256(shifted, _mm256_set1_epi8(3));
}

/* Probabilities times V scale as byte terms, and what one step of them is worth. */
struct weights {
    ALIGNED uint32_t terms[2][MAX_HEAD_DIM / GROUP][HEADS][PAGE / 2];
    ALIGNED float factor[4];
};

/* Scores to probabilities, with the V scale folded in; zero points join zero_sum. */
INLINE void weigh(const int D, const int GB, const int TERMS, const uint8_t *page, float scores[HEADS][PAGE], struct state *s,
                  struct weights *weights) {
    ALIGNED float inverse[4];
    const uint16_t *scale = (const uint16_t *)(page + V_SCALE(D)), *zero = (const uint16_t *)(page + V_ZERO(D));
    __m256 folded[HEADS][MAX_HEAD_DIM / GROUP][4], most[HEADS];
    UNROLL for (int g = 0; g < HEADS; g++) most[g] = _mm256_setzero_ps();
    UNROLL for (int g = 0; g < GB; g++) {
        __m256 p[4];
        UNROLL for (int k = 0; k < 4; k++) p[k] = _mm256_load_ps(scores[g] + 8 * k);
        to_probabilities(D, s, g, p);
        UNROLL for (int n = 0; n < D / GROUP; n++) {
            __m256 zeros = s->zero_sum[g][n];
            UNROLL for (int k = 0; k < 4; k++) {
                const __m256 sc = load_half8(scale + PAGE * n + 8 * k);
                const __m256 z = _mm256_add_ps(load_half8(zero + PAGE * n + 8 * k), sc);
                folded[g][n][k] = _mm256_mul_ps(p[k], sc);
                zeros = _mm256_fmadd_ps(p[k], z, zeros);
                most[g] = _mm256_max_ps(most[g], folded[g][n][k]);
            }
            s->zero_sum[g][n] = zeros;
        }
    }
    const __m128 peak = _mm_max_ps(max8x4(most), _mm_set1_ps(TINY));
    _mm_store_ps(inverse, _mm_div_ps(_mm_set1_ps(P_LEVELS(TERMS)), peak));
    _mm_store_ps(weights->factor, _mm_mul_ps(peak, _mm_set1_ps(1.0f / (FOLD * P_LEVELS(TERMS)))));
    UNROLL for (int g = 0; g < GB; g++)
        UNROLL for (int n = 0; n < D / GROUP; n++)
            store_terms(TERMS, folded[g][n], _mm256_set1_ps(inverse[g]), 0, weights->terms[0][n][g],
                        weights->terms[1][n][g]);
}

/* Adds the page's V, weighted, to the heads' outputs. */
INLINE void add_values(const int D, const int GB, const int TERMS, const uint8_t *page, const struct weights *weights, struct state *s) {
    ALIGNED __m256i rows[PAGE / 2][3];
    interleave_values(D, page + V_CODES(D), rows);
    UNROLL for (int j = 0; j < D / 16; j++) {
        __m256i acc[HEADS][2];
        UNROLL for (int g = 0; g < GB; g++) acc[g][0] = acc[g][1] = _mm256_setzero_si256();
        for (int t = 0; t < PAGE / 2; t++) { /* 16 * 2 * 255 * 3 < 2^15 */
            const __m256i c = channel_codes(D, rows[t], j);
            UNROLL for (int g = 0; g < GB; g++)
                UNROLL for (int r = 0; r < TERMS; r++)
                    accumulate(&acc[g][r], _mm256_maddubs_epi16(broadcast_pair(&weights->terms[r][j / 2][g][t]), c));
        }
        UNROLL for (int g = 0; g < GB; g++) {
            const __m256 f = _mm256_set1_ps(weights->factor[g]);
            float *o = s->out[g] + 16 * j; /* in the order of join_terms until the piece ends */
            __m256i sums[2];
            join_terms(TERMS, acc[g], sums);
            UNROLL for (int k = 0; k < 2; k++)
                _mm256_store_ps(o + 8 * k, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[k]), f, _mm256_load_ps(o + 8 * k)));
        }
    }
}

/* A partial of one query head: output [D], maximum, sum. */
INLINE void store_partial(const int D, const struct state *s, int g, float *partial) {
    for (int j = 0; j < D / 16; j++) {
        const __m256 a = _mm256_load_ps(s->out[g] + 16 * j), b = _mm256_load_ps(s->out[g] + 16 * j + 8);
        const __m256 zeros = _mm256_set1_ps(sum8(s->zero_sum[g][j / 2]));
        _mm256_storeu_ps(partial + 16 * j, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), zeros));
        _mm256_storeu_ps(partial + 16 * j + 8, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x31), zeros));
    }
    partial[D] = s->max[g];
    partial[D + 1] = sum8(s->sum[g]);
}

/* Where a piece's packed pages lie. */
struct pages {
    const uint8_t *pool; /* at the layer and head */
    const int32_t *table;
    int64_t block_stride;
    int pages_per_block, begin, end, sink_tokens;
};

INLINE const uint8_t *page_at(const struct pages *p, int index, const int page_bytes) {
    const int block = index / p->pages_per_block, page = index - block * p->pages_per_block;
    return p->pool + p->table[block] * p->block_stride + (int64_t)page * page_bytes;
}

INLINE void prefetch(const uint8_t *page, const int bytes) {
    for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char *)page + i, _MM_HINT_T0);
}

/* A piece for GB heads. `query` is [GB, D], times scale * log2(e). */
INLINE void attend_pages(const int D, const int GB, const int TERMS, const struct pages *pages, const float *query, float *partials) {
    ALIGNED uint32_t terms[2][HEADS][MAX_HEAD_DIM / 2];
    ALIGNED float scores[HEADS][PAGE], factor[4], bias[4];
    struct weights weights;
    struct state s;
    reset(&s);
    const uint8_t *next = page_at(pages, pages->begin, PAGE_BYTES(D));
    for (int i = pages->begin; i < pages->end; i++) {
        const uint8_t *page = next;
        if (i + 1 < pages->end) { /* the pool is seldom in cache */
            next = page_at(pages, i + 1, PAGE_BYTES(D));
            prefetch(next, PAGE_BYTES(D));
        }
        fold_queries(D, GB, TERMS, page, query, terms, factor, bias);
        page_scores(D, GB, TERMS, page, terms, factor, bias, scores);
        if (i == 0)
            for (int g = 0; g < GB; g++)
                for (int t = 0; t < pages->sink_tokens; t++) scores[g][t] = -INFINITY;
        weigh(D, GB, TERMS, page, scores, &s, &weights);
        add_values(D, GB, TERMS, page, &weights, &s);
    }
    for (int g = 0; g < GB; g++) store_partial(D, &s, g, partials + g * (D + 2));
}

/* A run of fp16 tokens of one KV head. */
struct half_run {
    const uint16_t *keys, *values; /* [count, D] */
    int count;
};

/* fp16 sinks and tail, in fp32. */
INLINE void attend_half(const int D, const int GB, const struct half_run runs[2], const float *query, float *partials) {
    ALIGNED float p[HEADS][MAX_HALF_TOKENS + 8];
    ALIGNED float out[HEADS][MAX_HEAD_DIM];
    int tokens = 0;
    for (int run = 0; run < 2; run++)
        for (int t = 0; t < runs[run].count; t++, tokens++) {
            __m256 dot[HEADS];
            UNROLL for (int g = 0; g < HEADS; g++) dot[g] = _mm256_setzero_ps();
            for (int i = 0; i < D; i += 8) {
                const __m256 k = load_half8(runs[run].keys + (int64_t)t * D + i);
                UNROLL for (int g = 0; g < GB; g++)
                    dot[g] = _mm256_fmadd_ps(_mm256_load_ps(query + g * D + i), k, dot[g]);
            }
            ALIGNED float score[4];
            _mm_store_ps(score, sum8x4(dot));
            UNROLL for (int g = 0; g < GB; g++) p[g][tokens] = score[g];
        }
    for (int g = 0; g < GB; g++) {
        for (int t = tokens; t < tokens + 8; t++) p[g][t] = -INFINITY;
        __m256 most = _mm256_set1_ps(LEAST_SCORE), sum = _mm256_setzero_ps();
        for (int t = 0; t < tokens; t += 8) most = _mm256_max_ps(most, _mm256_load_ps(p[g] + t));
        const float max = max8(most);
        for (int t = 0; t < tokens; t += 8) {
            const __m256 x = exp2_ps(_mm256_sub_ps(_mm256_load_ps(p[g] + t), _mm256_set1_ps(max)));
            sum = _mm256_add_ps(sum, x);
            _mm256_store_ps(p[g] + t, x);
        }
        partials[g * (D + 2) + D] = max;
        partials[g * (D + 2) + D + 1] = sum8(sum);
    }
    for (int i = 0; i < D; i += 16) {
        __m256 acc[HEADS][2];
        UNROLL for (int g = 0; g < GB; g++) acc[g][0] = acc[g][1] = _mm256_setzero_ps();
        int token = 0;
        for (int run = 0; run < 2; run++)
            for (int t = 0; t < runs[run].count; t++, token++) {
                const uint16_t *v = runs[run].values + (int64_t)t * D + i;
                const __m256 v0 = load_half8(v), v1 = load_half8(v + 8);
                UNROLL for (int g = 0; g < GB; g++) {
                    const __m256 weight = _mm256_set1_ps(p[g][token]);
                    acc[g][0] = _mm256_fmadd_ps(weight, v0, acc[g][0]);
                    acc[g][1] = _mm256_fmadd_ps(weight, v1, acc[g][1]);
                }
            }
        UNROLL for (int g = 0; g < GB; g++)
            UNROLL for (int k = 0; k < 2; k++) _mm256_store_ps(out[g] + i + 8 * k, acc[g][k]);
    }
    for (int g = 0; g < GB; g++) memcpy(partials + g * (D + 2), out[g], sizeof(float) * D);
}

typedef void (*pages_fn)(const struct pages *, const float *, float *);
typedef void (*half_fn)(const struct half_run[2], const float *, float *);

#define SPECIALISE(D, GB)                                                                              \
    static void one_term_##D##_##GB(const struct pages *pages, const float *query, float *partials) {  \
        attend_pages(D, GB, 1, pages, query, partials);                                                \
    }                                                                                                  \
    static void two_terms_##D##_##GB(const struct pages *pages, const float *query, float *partials) { \
        attend_pages(D, GB, 2, pages, query, partials);                                                \
    }                                                                                                  \
    static void half_##D##_##GB(const struct half_run runs[2], const float *query, float *partials) {  \
        attend_half(D, GB, runs, query, partials);                                                     \
    }
#define SPECIALISE_HEADS(D) SPECIALISE(D, 1) SPECIALISE(D, 2) SPECIALISE(D, 3) SPECIALISE(D, 4)
SPECIALISE_HEADS(32)
SPECIALISE_HEADS(64)
SPECIALISE_HEADS(96)
SPECIALISE_HEADS(128)

#define ROW(kind, D) {kind##_##D##_1, kind##_##D##_2, kind##_##D##_3, kind##_##D##_4}
#define TABLE(kind) {ROW(kind, 32), ROW(kind, 64), ROW(kind, 96), ROW(kind, 128)}
static const pages_fn attend_pages_of[2][4][HEADS] = {TABLE(one_term), TABLE(two_terms)};
static const half_fn attend_half_of[4][HEADS] = TABLE(half);

/* Merges the partials of one KV head, in the order of pieces. */
static void merge_pieces(const struct decode_call *call, int64_t sequence, int64_t head) {
    const struct decode_args *a = call->args;
    const int64_t D = a->head_dim, begin = call->first_piece[sequence], end = call->first_piece[sequence + 1];
    const int64_t stride = a->kv_heads * a->group * (D + 2);
    for (int64_t g = 0; g < a->group; g++) {
        const float *partials = call->partials + (head * a->group + g) * (D + 2);
        float *out = a->out + ((sequence * a->kv_heads + head) * a->group + g) * D;
        float max = LEAST_SCORE, sum = 0.0f;
        for (int64_t p = begin; p < end; p++) max = fmaxf(max, partials[p * stride + D]);
        memset(out, 0, sizeof(float) * (size_t)D);
        for (int64_t p = begin; p < end; p++) {
            const float *partial = partials + p * stride;
            const float weight = exp2_scalar(partial[D] - max);
            sum += weight * partial[D + 1];
            for (int64_t i = 0; i < D; i += 8)
                _mm256_storeu_ps(out + i, _mm256_fmadd_ps(_mm256_set1_ps(weight), _mm256_loadu_ps(partial + i),
                                                          _mm256_loadu_ps(out + i)));
        }
        for (int64_t i = 0; i < D; i += 8)
            _mm256_storeu_ps(out + i, _mm256_div_ps(_mm256_loadu_ps(out + i), _mm256_set1_ps(sum)));
    }
}

/* Item: one piece of one KV head of one sequence. Piece 0 is the fp16 tokens. */
static void decode_item(void *context, int64_t item) {
    const struct decode_call *call = context;
    const struct decode_args *a = call->args;
    const int64_t piece = item / a->kv_heads, head = item % a->kv_heads;
    int64_t b = 0;
    while (call->first_piece[b + 1] <= piece) b++;
    const int D = (int)a->head_dim, group = (int)a->group, index = (int)(piece - call->first_piece[b]);
    const int pages_per_block = (int)(a->block_size / PAGE), num_pages = a->num_blocks[b] * pages_per_block;

    const uint16_t *sinks = a->sinks + a->slots[b] * a->sinks_slot_stride + head * a->sinks_head_stride;
    const uint16_t *tail = a->tails + a->slots[b] * a->tails_slot_stride + head * a->tails_head_stride;
    const struct half_run runs[2] = {
        {sinks, sinks + a->sink_tokens * D, num_pages ? (int)a->sink_tokens : 0},
        {tail, tail + a->tails_value_offset, a->tail_lens[b]},
    };
    struct pages pages = {
        .pool = a->pool + head * a->pool_head_stride,
        .table = a->block_tables + b * a->table_stride,
        .block_stride = a->pool_block_stride,
        .pages_per_block = pages_per_block,
        .begin = (index - 1) * PIECE_PAGES,
        .end = index * PIECE_PAGES < num_pages ? index * PIECE_PAGES : num_pages,
        .sink_tokens = (int)a->sink_tokens,
    };
    float *partials = call->partials + (piece * a->kv_heads + head) * group * (D + 2);
    const float *query = a->query + (b * a->kv_heads + head) * group * D;
    for (int g = 0; g < group; g += HEADS) {
        const int heads = group - g < HEADS ? group - g : HEADS;
        ALIGNED float scaled[HEADS * MAX_HEAD_DIM];
        for (int i = 0; i < heads * D; i++) scaled[i] = query[g * D + i] * (a->scale * LOG2E);
        if (index == 0)
            attend_half_of[D / 32 - 1][heads - 1](runs, scaled, partials + g * (D + 2));
        else
            attend_pages_of[a->terms - 1][D / 32 - 1][heads - 1](&pages, scaled, partials + g * (D + 2));
    }
    if (atomic_fetch_sub_explicit(&call->unfinished[b * a->kv_heads + head], 1, memory_order_acq_rel) == 1)
        merge_pieces(call, b, head);
}

static int check(const struct decode_args *a) {
    if (a->head_dim % 32 || a->head_dim < 32 || a->head_dim > MAX_HEAD_DIM) return STATUS_HEAD_DIM;
    if (a->terms != 1 && a->terms != 2) return STATUS_TERMS;
    if (a->block_size + a->sink_tokens > MAX_HALF_TOKENS || a->sink_tokens >= PAGE) return STATUS_LENGTH;
    for (int64_t b = 0; b < a->batch; b++) {
        if (a->slots[b] < 0 || a->slots[b] >= a->num_slots) return STATUS_SLOT;
        if (a->tail_lens[b] < 1 || a->tail_lens[b] > a->block_size) return STATUS_LENGTH;
        if (a->num_blocks[b] < 0 || a->num_blocks[b] > a->table_stride) return STATUS_LENGTH;
        const int32_t *table = a->block_tables + b * a->table_stride;
        for (int32_t i = 0; i < a->num_blocks[b]; i++)
            if (table[i] < 0 || table[i] >= a->pool_blocks) return STATUS_BLOCK_ID;
    }
    return STATUS_OK;
}

EXPORT const int kvferry_decode_args_size = sizeof(struct decode_args); /* native.py compares */

EXPORT int kvferry_decode(const struct decode_args *a) {
    const int status = check(a);
    if (status || !a->batch) return status;
    struct decode_call call = {.args = a};
    call.first_piece = malloc(sizeof *call.first_piece * (size_t)(a->batch + 1));
    call.unfinished = malloc(sizeof *call.unfinished * (size_t)(a->batch * a->kv_heads));
    if (!call.first_piece || !call.unfinished) {
        free(call.first_piece);
        free((void *)call.unfinished);
        return STATUS_MEMORY;
    }
    call.first_piece[0] = 0;
    int64_t pages = 0;
    for (int64_t b = 0; b < a->batch; b++) {
        const int64_t own = a->num_blocks[b] * (a->block_size / PAGE);
        const int64_t pieces = 1 + (own + PIECE_PAGES - 1) / PIECE_PAGES;
        pages += own;
        call.first_piece[b + 1] = call.first_piece[b] + pieces;
        for (int64_t h = 0; h < a->kv_heads; h++) atomic_init(&call.unfinished[b * a->kv_heads + h], (int)pieces);
    }
    const int64_t items = call.first_piece[a->batch] * a->kv_heads;
    call.partials = malloc(sizeof(float) * (size_t)(items * a->group * (a->head_dim + 2)));
    const int64_t work = (pages + a->batch) * a->kv_heads * a->group;
    if (call.partials) run_items(decode_item, &call, items, work > SERIAL_WORK ? (int)a->threads : 1);
    const int result = call.partials ? STATUS_OK : STATUS_MEMORY;
    free(call.partials);
    free((void *)call.unfinished);
    free(call.first_piece);
    return result;
}
