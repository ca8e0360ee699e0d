/* What a score is made of, and which tokens a query sees: ScoreRule of the reference. */
#pragma once

#include "simd.h"

#define LOG2E 1.44269504f
#define LEAST_SCORE (-1e30f) /* below every score, and finite: a difference of two is not NaN */

struct score_rule {
    int64_t window; /* tokens that a query sees, its own included; more than any context without a window */
    float scale, softcap; /* no cap: 0 */
};

/* The first position that a query at `position` sees. */
INLINE int64_t first_visible(const struct score_rule *rule, int64_t position) {
    return position >= rule->window ? position - rule->window + 1 : 0;
}

/* softcap * tanh(s / softcap) for scores in powers of 2: tanh y = 1 - 2 / (1 + e^2y), off by 2e-7 of the cap. NaN stays
 * NaN, which is why x is the second operand of min and max. */
INLINE __m256 cap_scores(__m256 x, float softcap) {
    const __m256 cap = _mm256_set1_ps(softcap * LOG2E), one = _mm256_set1_ps(1.0f);
    x = _mm256_mul_ps(x, _mm256_set1_ps(2.0f / softcap)); /* 2y log2(e) */
    x = _mm256_max_ps(_mm256_set1_ps(-60.0f), _mm256_min_ps(_mm256_set1_ps(60.0f), x));
    const __m256 share = _mm256_div_ps(_mm256_set1_ps(2.0f), _mm256_add_ps(exp2_ps(x), one));
    return _mm256_mul_ps(cap, _mm256_sub_ps(one, share));
}
