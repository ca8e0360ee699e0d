/* reference.fit_groups for eight groups, one a lane, with the same bits: the same operations in the same order, none of
 * them fused. */
#pragma once

#include "page.h"
#include "simd.h"

#define FIT_STEPS 2
#define MIN_FOLDED_SCALE 0x1p-14f
#define MAX_FOLDED 65504.0f
#define MAX_BYTE_SCALE 57344.0f
#define LIMIT 16384.0f

/* What the width of codes decides, one group a lane. */
struct widths {
    __m256 top, shrink, unit_offset, zero_step, steps_needed;
};

INLINE struct widths widths_of(int64_t bits, float unit_offset, float zero_step) {
    const float top = (float)((1 << bits) - 1);
    return (struct widths){
        .top = _mm256_set1_ps(top),
        .shrink = _mm256_set1_ps(bits == 2 ? (float)(0.8 / 3.0) : (float)(1.0 / top)),
        .unit_offset = _mm256_set1_ps(unit_offset),
        .zero_step = _mm256_set1_ps(zero_step),
        .steps_needed = _mm256_set1_ps((float)(1.0 / (127.0 * (double)zero_step))),
    };
}

/* `b` in the lanes of `mask`, else `a`. */
INLINE struct widths blend_widths(struct widths a, struct widths b, __m256 mask) {
    return (struct widths){
        .top = _mm256_blendv_ps(a.top, b.top, mask),
        .shrink = _mm256_blendv_ps(a.shrink, b.shrink, mask),
        .unit_offset = _mm256_blendv_ps(a.unit_offset, b.unit_offset, mask),
        .zero_step = _mm256_blendv_ps(a.zero_step, b.zero_step, mask),
        .steps_needed = _mm256_blendv_ps(a.steps_needed, b.steps_needed, mask),
    };
}

/* How eight groups become codes. Byte scales and zero points lie in the low half of each word. */
struct fit {
    __m128i stored_scale, stored_zero;
    __m256 zero, inverse, top;
};

INLINE __m256 clamp_ps(__m256 x, float least, float most) {
    return _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(least)), _mm256_set1_ps(most));
}

INLINE __m256 round_ps(__m256 x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

INLINE __m256 inverse_of(__m256 scale) {
    const __m256 smallest = _mm256_set1_ps(MIN_FOLDED_SCALE / FOLD);
    return _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_max_ps(scale, smallest));
}

INLINE __m256 nearest_code(__m256 x, __m256 zero, __m256 inverse, __m256 top) {
    const __m256 c = round_ps(_mm256_mul_ps(_mm256_sub_ps(x, zero), inverse));
    return _mm256_min_ps(_mm256_max_ps(c, _mm256_setzero_ps()), top);
}

/* scales.round_scale; returns S as a reader will see it. */
INLINE __m256 round_scale(const int byte_scales, const struct widths *w, __m256 scale, __m256 zero, __m128i *stored) {
    const __m256 folded = _mm256_mul_ps(scale, _mm256_set1_ps(FOLD));
    if (!byte_scales) {
        *stored = _mm256_cvtps_ph(clamp_ps(folded, MIN_FOLDED_SCALE, MAX_FOLDED), _MM_FROUND_TO_NEAREST_INT);
        return _mm256_cvtph_ps(*stored);
    }
    const __m256 needed = _mm256_mul_ps(abs_ps(zero), w->steps_needed);
    const __m256 wanted = clamp_ps(_mm256_max_ps(folded, needed), MIN_FOLDED_SCALE, MAX_BYTE_SCALE);
    const __m128i half = _mm256_cvtps_ph(wanted, _MM_FROUND_TO_NEAREST_INT);
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(half, 7), _mm_set1_epi16(1));
    *stored = _mm_srli_epi16(_mm_add_epi16(_mm_add_epi16(half, _mm_set1_epi16(63)), odd), 7);
    return _mm256_cvtph_ps(_mm_slli_epi16(*stored, 7));
}

/* scales.round_zero; returns the zero point as a reader will see it. */
INLINE __m256 round_zero(const int byte_scales, const struct widths *w, __m256 zero, __m256 folded, __m128i *stored) {
    if (!byte_scales) {
        const __m256 offset = _mm256_mul_ps(w->unit_offset, folded);
        *stored = _mm256_cvtps_ph(clamp_ps(_mm256_sub_ps(zero, offset), -MAX_FOLDED, MAX_FOLDED),
                                  _MM_FROUND_TO_NEAREST_INT);
        return _mm256_add_ps(_mm256_cvtph_ps(*stored), offset);
    }
    const __m256 step = _mm256_mul_ps(folded, w->zero_step);
    const __m256i i = _mm256_cvtps_epi32(clamp_ps(round_ps(_mm256_div_ps(zero, step)), -128.0f, 127.0f));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    *stored = _mm_and_si128(words, _mm_set1_epi16(255));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(i), step);
}

/* Groups of values x[first] .. x[end - 1]. */
static struct fit fit_groups(int byte_scales, const struct widths *w, float (*x)[8], int first, int end) {
    __m256 lo = _mm256_load_ps(x[first]), hi = lo, sum = lo;
    for (int t = first + 1; t < end; t++) {
        const __m256 v = _mm256_load_ps(x[t]);
        lo = _mm256_min_ps(lo, v);
        hi = _mm256_max_ps(hi, v);
        sum = _mm256_add_ps(sum, v);
    }
    struct fit fit = {.top = w->top};
    const __m256 count = _mm256_set1_ps((float)(end - first));
    const __m256 mean_x = _mm256_div_ps(sum, count);
    __m256 scale = _mm256_mul_ps(_mm256_sub_ps(hi, lo), w->shrink);
    __m256 zero = _mm256_sub_ps(_mm256_mul_ps(_mm256_add_ps(lo, hi), _mm256_set1_ps(0.5f)),
                                _mm256_mul_ps(_mm256_mul_ps(w->top, _mm256_set1_ps(0.5f)), scale));
    __m256 mean_c = _mm256_setzero_ps();
    for (int step = 0; step < FIT_STEPS; step++) {
        const __m256 inverse = inverse_of(scale);
        __m256 c1 = _mm256_setzero_ps(), c2 = c1, y1 = c1, cy = c1; /* sums of c, c^2, x - mean_x, c (x - mean_x) */
        for (int t = first; t < end; t++) {
            const __m256 v = _mm256_load_ps(x[t]);
            const __m256 c = nearest_code(v, zero, inverse, fit.top);
            const __m256 y = _mm256_sub_ps(v, mean_x);
            c1 = _mm256_add_ps(c1, c);
            c2 = _mm256_add_ps(c2, _mm256_mul_ps(c, c));
            y1 = _mm256_add_ps(y1, y);
            cy = _mm256_add_ps(cy, _mm256_mul_ps(c, y));
        }
        mean_c = _mm256_div_ps(c1, count);
        const __m256 spread = _mm256_sub_ps(_mm256_mul_ps(count, c2), _mm256_mul_ps(c1, c1));
        const __m256 covariance = _mm256_sub_ps(cy, _mm256_mul_ps(mean_c, y1));
        const __m256 fitted = _mm256_div_ps(_mm256_mul_ps(covariance, count), spread);
        scale = _mm256_blendv_ps(scale, fitted, _mm256_cmp_ps(spread, _mm256_setzero_ps(), _CMP_GT_OQ));
        zero = _mm256_sub_ps(mean_x, _mm256_mul_ps(scale, mean_c));
    }
    const __m256 folded = round_scale(byte_scales, w, scale, zero, &fit.stored_scale);
    scale = _mm256_mul_ps(folded, _mm256_set1_ps(1.0f / FOLD));
    const __m256 fitted_zero = _mm256_sub_ps(mean_x, _mm256_mul_ps(scale, mean_c));
    fit.zero = round_zero(byte_scales, w, fitted_zero, folded, &fit.stored_zero);
    fit.inverse = inverse_of(scale);
    return fit;
}

/* Writes the scales or zero points of eight groups, the first of which has this index. */
INLINE void store_groups(const struct tensor_format *f, uint8_t *part, int64_t first, __m128i stored) {
    if (f->byte_scales)
        _mm_storel_epi64((__m128i *)(part + first), _mm_packus_epi16(stored, stored));
    else
        _mm_storeu_si128((__m128i *)(part + 2 * first), stored);
}
