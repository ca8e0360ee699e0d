/* Running softmax of decode attention, for a register block of query heads. */
#pragma once

#include <string.h>

#include "page.h"
#include "rule.h"

#define HEADS 4 /* query heads a register block */
/* The running maximum follows only when a score exceeds it by this much (as a power of 2): probabilities grow to 256
 * and rescaling becomes rare. */
#define LAZY 8.0f

struct state {
    ALIGNED float out[HEADS][MAX_HEAD_DIM]; /* 16 channels at a time, in the order of join_terms */
    ALIGNED __m256 zero_sum[HEADS][MAX_VALUE_GROUPS]; /* probability * V zero point, one lane in eight tokens */
    ALIGNED __m256 sum[HEADS];
    float max[HEADS];
    int groups; /* V groups */
};

INLINE void reset(struct state *s, int groups) {
    memset(s, 0, sizeof *s);
    s->groups = groups;
    for (int g = 0; g < HEADS; g++) s->max[g] = LEAST_SCORE;
}

/* Raises a head's maximum to `max` and rescales what was summed under the old one. */
INLINE void raise_max(const int D, struct state *s, int g, float max) {
    const __m256 factor = _mm256_set1_ps(exp2_scalar(s->max[g] - max));
    for (int i = 0; i < D; i += 8)
        _mm256_store_ps(s->out[g] + i, _mm256_mul_ps(_mm256_load_ps(s->out[g] + i), factor));
    for (int n = 0; n < s->groups; n++) s->zero_sum[g][n] = _mm256_mul_ps(s->zero_sum[g][n], factor);
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

/* A partial of one query head: output [D], maximum, sum. `shift`: log2 of the 16-channel columns of a V group. */
INLINE void store_partial(const int D, const struct state *s, int g, int shift, float *partial) {
    for (int j = 0; j < D / 16; j++) {
        const __m256 a = _mm256_load_ps(s->out[g] + 16 * j), b = _mm256_load_ps(s->out[g] + 16 * j + 8);
        const __m256 zeros = _mm256_set1_ps(s->groups ? sum8(s->zero_sum[g][j >> shift]) : 0.0f);
        _mm256_storeu_ps(partial + 16 * j, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), zeros));
        _mm256_storeu_ps(partial + 16 * j + 8, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x31), zeros));
    }
    partial[D] = s->max[g];
    partial[D + 1] = sum8(s->sum[g]);
}
