/* Scales and zero points as kernels/scales.py stores them, eight groups at a time. */
#pragma once

#include "page.h"
#include "simd.h"

/* The stored S of groups first .. first + 7. */
INLINE __m256 load_scales(const struct tensor_format *f, const uint8_t *page, int64_t first) {
    if (!f->byte_scales) return load_half8((const uint16_t *)(page + f->scale) + first);
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)(page + f->scale + first));
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 7));
}

/* Their zero points, unfolded. `factor` is what `zero_factor` says of their codes. */
INLINE __m256 load_zeros(const struct tensor_format *f, const uint8_t *page, int64_t first, __m256 scales,
                         __m256 factor) {
    if (!f->byte_scales) {
        const __m256 folded = load_half8((const uint16_t *)(page + f->zero) + first);
        return _mm256_fmadd_ps(factor, scales, folded);
    }
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)(page + f->zero + first));
    const __m256 steps = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    return _mm256_mul_ps(steps, _mm256_mul_ps(scales, factor));
}

/* What a stored zero point needs to be unfolded: the offset of u, or the step of a byte, over S. */
INLINE float zero_factor(const struct tensor_format *f) { return f->byte_scales ? f->zero_step : f->unit_offset; }

/* The same for each channel of K, where some are boosted. */
INLINE void channel_zero_factors(const int D, const struct tensor_format *f, const uint8_t *page, float *out) {
    const float boosted = f->byte_scales ? f->boosted_zero_step : f->boosted_unit_offset;
    for (int c = 0; c < D; c += 8) _mm256_store_ps(out + c, _mm256_set1_ps(zero_factor(f)));
    for (int64_t i = 0; i < f->boosted; i++) out[page[f->channels + i]] = boosted;
}
