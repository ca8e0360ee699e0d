/* A tile of 32 tokens as fp32: keys [D, 32 tokens], values [32 tokens, D]. */
#pragma once

#include <stddef.h>

#include "scales.h"

/* What each code of a plane adds in eight groups, as vpermilps wants it: out[i] = group i's four numbers, twice. */
INLINE void code_tables(__m256 step, __m256 z, __m256 out[8]) {
    __m256 v[4] = {z, _mm256_add_ps(step, z), _mm256_fmadd_ps(_mm256_set1_ps(2.0f), step, z),
                   _mm256_fmadd_ps(_mm256_set1_ps(3.0f), step, z)};
    __m256 ab_low = _mm256_unpacklo_ps(v[0], v[1]), ab_high = _mm256_unpackhi_ps(v[0], v[1]);
    __m256 cd_low = _mm256_unpacklo_ps(v[2], v[3]), cd_high = _mm256_unpackhi_ps(v[2], v[3]);
    __m256 pair[4] = {_mm256_shuffle_ps(ab_low, cd_low, 0x44), _mm256_shuffle_ps(ab_low, cd_low, 0xEE),
                      _mm256_shuffle_ps(ab_high, cd_high, 0x44), _mm256_shuffle_ps(ab_high, cd_high, 0xEE)};
    UNROLL for (int i = 0; i < 4; i++) {
        out[i] = _mm256_permute2f128_ps(pair[i], pair[i], 0x00);
        out[i + 4] = _mm256_permute2f128_ps(pair[i], pair[i], 0x11);
    }
}

/* Tables of groups first .. first + 7; the zero point is added with the lowest plane. */
INLINE void plane_tables(const struct tensor_format *f, const uint8_t *page, int64_t first, __m256 zero_factors,
                         int plane, __m256 out[8]) {
    const __m256 s = load_scales(f, page, first);
    const __m256 z = plane ? _mm256_setzero_ps() : load_zeros(f, page, first, s, zero_factors);
    code_tables(_mm256_mul_ps(s, _mm256_set1_ps((float)(1 << 2 * plane) / FOLD)), z, out);
}

/* Field i of eight 32-bit lanes picks from a table: vpermilps looks at the two low bits only. */
INLINE __m256 look_up(__m256 table, __m256i codes, int shift) {
    return _mm256_permutevar_ps(table, shift ? _mm256_srli_epi32(codes, shift) : codes);
}

/* `x` to out for the first plane, onto it for the others. */
INLINE void put(float *out, __m256 x, int plane) {
    _mm256_store_ps(out, plane ? _mm256_add_ps(_mm256_load_ps(out), x) : x);
}

/* One plane of a tile's keys, `words` rows of codes. Their i-th channel is the head's channels[i], or i without it. */
INLINE void unpack_key_plane(const int D, const struct tensor_format *k, const uint8_t *page, int tile, int plane,
                             const float *zero_factors, const uint8_t *codes, const int words, const uint8_t *channels,
                             float *keys) {
    ALIGNED float tables[MAX_HEAD_DIM][8];
    const int group = (int)k->group, span = group < PAGE ? group : PAGE;
    for (int begin = 0; begin < PAGE; begin += span) {
        const int64_t first = (int64_t)((tile * PAGE + begin) / group) * D;
        for (int c = 0; c < D; c += 8) {
            __m256 t[8];
            plane_tables(k, page, first + c, _mm256_load_ps(zero_factors + c), plane, t);
            UNROLL for (int i = 0; i < 8; i++) _mm256_store_ps(tables[c + i], t[i]);
        }
        for (int word = 0; word < words; word++)
            for (int t = begin; t < begin + span; t += 8) {
                const __m256i w =
                    _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(codes + 2 * (PAGE * word + t))));
                UNROLL for (int byte = 0; byte < 2; byte++)
                    UNROLL for (int i = 0; i < 4; i++) {
                        const int place = i * 2 * words + 2 * word + byte, channel = channels ? channels[place] : place;
                        const __m256 table = _mm256_load_ps(tables[channel]);
                        put(keys + channel * PAGE + t, look_up(table, w, 8 * byte + 2 * i), plane);
                    }
            }
    }
}

/* The lowest plane is a case of its own: it adds to nothing, and most pages have no other. */
INLINE void unpack_keys(const int D, const struct page_format *f, const uint8_t *page, int tile, float *keys) {
    ALIGNED float zero_factors[MAX_HEAD_DIM];
    const struct tensor_format *k = &f->key;
    const int planes = planes_of(k), boosted = (int)k->boosted;
    const uint8_t *codes = page + k->codes + tile * planes * PLANE_BYTES(D);
    channel_zero_factors(D, k, page, zero_factors);
    unpack_key_plane(D, k, page, tile, 0, zero_factors, codes, D / 8, NULL, keys);
    for (int plane = 1; plane < planes; plane++)
        unpack_key_plane(D, k, page, tile, plane, zero_factors, codes + plane * PLANE_BYTES(D), D / 8, NULL, keys);
    if (boosted)
        unpack_key_plane(D, k, page, tile, planes, zero_factors, page + k->boost + tile * PLANE_BYTES(boosted),
                         boosted / 8, page + k->channels, keys);
}

INLINE void unpack_value_plane(const int D, const struct page_format *f, const uint8_t *page, int tile, int plane,
                               float *values) {
    ALIGNED float tables[MAX_VALUE_GROUPS][8][8];
    const int planes = planes_of(&f->value), groups = value_groups(f, D), group = (int)f->value.group;
    const int shift = __builtin_ctz((unsigned)group);
    const __m256 zero = _mm256_set1_ps(zero_factor(&f->value));
    for (int t = 0; t < PAGE; t += 8) {
        for (int n = 0; n < groups; n++) {
            __m256 v[8];
            plane_tables(&f->value, page, (int64_t)(tile * groups + n) * PAGE + t, zero, plane, v);
            UNROLL for (int i = 0; i < 8; i++) _mm256_store_ps(tables[n][i], v[i]);
        }
        for (int k = 0; k < 8; k++) {
            const uint8_t *codes =
                page + f->value.codes + (tile * planes + plane) * PLANE_BYTES(D) + (t + k) * (D / 4);
            float *out = values + (t + k) * D;
            UNROLL for (int b = 0; b + 8 <= D / 4; b += 8) {
                const __m256i w = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + b)));
                UNROLL for (int i = 0; i < 4; i++) {
                    const int channel = i * (D / 4) + b; /* groups may change every 4 channels */
                    __m256 table = _mm256_load_ps(tables[channel >> shift][k]);
                    if (D / 4 % 8)
                        table = _mm256_blend_ps(table, _mm256_load_ps(tables[(channel + 4) >> shift][k]), 0xF0);
                    const __m256 x = look_up(table, w, 2 * i);
                    _mm256_storeu_ps(out + channel, plane ? _mm256_add_ps(_mm256_loadu_ps(out + channel), x) : x);
                }
            }
            if (D / 4 % 8) {
                const int b = D / 4 - 4;
                int32_t four;
                memcpy(&four, codes + b, 4);
                const __m128i w = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(four));
                UNROLL for (int i = 0; i < 4; i++) {
                    const int channel = i * (D / 4) + b;
                    const __m128 table = _mm_load_ps(tables[channel >> shift][k]);
                    const __m128 x = _mm_permutevar_ps(table, _mm_srli_epi32(w, 2 * i));
                    _mm_storeu_ps(out + channel, plane ? _mm_add_ps(_mm_loadu_ps(out + channel), x) : x);
                }
            }
        }
    }
}

INLINE void unpack_values(const int D, const struct page_format *f, const uint8_t *page, int tile, float *values) {
    unpack_value_plane(D, f, page, tile, 0, values);
    for (int plane = 1; plane < planes_of(&f->value); plane++) unpack_value_plane(D, f, page, tile, plane, values);
}

/* `count` fp16 tokens, 1 to 32; the rest of the tile becomes 0. */
INLINE void load_half_keys(const int D, const uint16_t *keys, int64_t stride, int count, float *out) {
    static const uint16_t zeros[MAX_HEAD_DIM];
    for (int t = 0; t < PAGE; t += 8)
        for (int c = 0; c < D; c += 8) {
            __m256 r[8];
            UNROLL for (int i = 0; i < 8; i++) r[i] = load_half8(t + i < count ? keys + (t + i) * stride + c : zeros);
            transpose8(r);
            UNROLL for (int i = 0; i < 8; i++) _mm256_store_ps(out + (c + i) * PAGE + t, r[i]);
        }
}

INLINE void load_half_values(const int D, const uint16_t *values, int64_t stride, int count, float *out) {
    for (int t = 0; t < PAGE; t++)
        for (int c = 0; c < D; c += 8)
            _mm256_store_ps(out + t * D + c, t < count ? load_half8(values + t * stride + c) : _mm256_setzero_ps());
}

/* A tile of a page, in whatever format it is stored. */
INLINE void load_tile(const int D, const struct page_format *f, const uint8_t *page, int tile, float *keys,
                      float *values) {
    if (f->key.bits == 16)
        load_half_keys(D, (const uint16_t *)(page + f->key.codes) + tile * PAGE * D, D, PAGE, keys);
    else
        unpack_keys(D, f, page, tile, keys);
    if (f->value.bits == 16)
        load_half_values(D, (const uint16_t *)(page + f->value.codes) + tile * PAGE * D, D, PAGE, values);
    else
        unpack_values(D, f, page, tile, values);
}
