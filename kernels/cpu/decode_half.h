/* Decode attention to the fp16 tokens of a context: sinks and tail, in fp32. */
#pragma once

#include <math.h>
#include <string.h>

#include "decode_state.h"

#define MAX_HALF_TOKENS (1024 + 16)

/* A run of fp16 tokens of one KV head. */
struct half_run {
    const uint16_t *keys, *values; /* [count, D] */
    int count;
};

/* fp16 sinks and tail, in fp32. */
INLINE void attend_half(const int D, const int GB, const struct half_run runs[2], float softcap, const float *query,
                        float *partials) {
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
        if (softcap > 0)
            for (int t = 0; t < tokens; t += 8)
                _mm256_store_ps(p[g] + t, cap_scores(_mm256_load_ps(p[g] + t), softcap));
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
