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

/* Their zero points, unfolded. */
INLINE __m256 load_zeros(const struct tensor_format *f, const uint8_t *page, int64_t first, __m256 scales) {
    if (!f->byte_scales) {
        const __m256 folded = load_half8((const uint16_t *)(page + f->zero) + first);
        return _mm256_fmadd_ps(_mm256_set1_ps(f->unit_offset), scales, folded);
    }
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)(page + f->zero + first));
    const __m256 steps = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    return _mm256_mul_ps(steps, _mm256_mul_ps(scales, _mm256_set1_ps(f->zero_step)));
}
