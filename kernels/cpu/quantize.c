/* Quantize and pack: quantize_pages of the reference with the same bits, eight groups at a time. */
#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#include "fit.h"
#include "library.h"
#include "page.h"
#include "parallel.h"
#include "simd.h"

/* One layer of one block. Strides count elements; a row is contiguous. */
struct quantize_args {
    const uint16_t *keys, *values; /* fp16 [H, T, D] */
    uint8_t *out;                  /* [H, page, page bytes] */
    int64_t key_head_stride, key_token_stride, value_head_stride, value_token_stride;
    int64_t kv_heads, pages, head_dim, sink_tokens, threads;
    struct page_format page;
};

struct quantize_call {
    const struct quantize_args *args;
    _Atomic int not_finite;
};

/* Codes of rows t .. t + 3, each 8 bytes long, to out[0], out[stride], ... */
INLINE void store_codes(float (*x)[8], int t, const struct fit *fit, uint8_t *out, ptrdiff_t stride) {
    __m256i c[4];
    UNROLL for (int i = 0; i < 4; i++)
        c[i] = _mm256_cvtps_epi32(nearest_code(_mm256_load_ps(x[t + i]), fit->zero, fit->inverse, fit->top));
    __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
    bytes = unpacked_order(bytes);
    __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    _mm_storel_epi64((__m128i *)out, low);
    _mm_storeh_pd((double *)(out + stride), _mm_castsi128_pd(low));
    _mm_storel_epi64((__m128i *)(out + 2 * stride), high);
    _mm_storeh_pd((double *)(out + 3 * stride), _mm_castsi128_pd(high));
}

/* Eight fp16. `bad` collects lanes whose exponent is all ones: infinity or NaN. */
INLINE __m128i load_checked(const uint16_t *p, __m128i *bad) {
    const __m128i exponent = _mm_set1_epi16(0x7C00);
    const __m128i h = _mm_loadu_si128((const __m128i *)p);
    *bad = _mm_or_si128(*bad, _mm_cmpeq_epi16(_mm_and_si128(h, exponent), exponent));
    return h;
}

INLINE __m256 load_clamped(const uint16_t *p, __m128i *bad) {
    return clamp_ps(_mm256_cvtph_ps(load_checked(p, bad)), -LIMIT, LIMIT);
}

/* Two bits, from bit `shift` on, of four rows of codes, `distance` bytes apart, as one row of planar bytes. */
INLINE __m256i planar(const uint8_t *codes, ptrdiff_t distance, int shift) {
    const __m128i count = _mm_cvtsi32_si128(shift);
    __m256i r = _mm256_setzero_si256();
    UNROLL for (int i = 0; i < 4; i++) {
        __m256i c = _mm256_loadu_si256((const __m256i *)(codes + i * distance));
        c = _mm256_and_si256(_mm256_srl_epi16(c, count), _mm256_set1_epi8(3));
        r = _mm256_or_si256(r, _mm256_slli_epi16(c, 2 * i)); /* 3 << 6 stays in its byte */
    }
    return r;
}

/* out[column][row] = in[row][column] for an 8 x 8 tile of 16-bit words. */
INLINE void transpose_words(const uint8_t *in, ptrdiff_t in_stride, __m128i out[8]) {
    __m128i r[8], t[8];
    UNROLL for (int i = 0; i < 8; i++) r[i] = _mm_loadu_si128((const __m128i *)(in + i * in_stride));
    UNROLL for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        r[4 * i] = _mm_unpacklo_epi32(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm_unpackhi_epi32(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm_unpacklo_epi32(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm_unpackhi_epi32(t[4 * i + 1], t[4 * i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        out[2 * i] = _mm_unpacklo_epi64(r[i], r[i + 4]);
        out[2 * i + 1] = _mm_unpackhi_epi64(r[i], r[i + 4]);
    }
}

/* One plane of a tile of key codes [32 tokens][channel], for all channels or the boosted ones. */
static void pack_keys(int head_dim, const uint8_t *codes, int shift, uint8_t *out) {
    ALIGNED uint8_t rows[PAGE][MAX_HEAD_DIM / 4]; /* [token][planar byte] */
    for (int t = 0; t < PAGE; t++)
        for (int b = 0; b < head_dim / 4; b += 32)
            _mm256_store_si256((__m256i *)(rows[t] + b), planar(codes + t * head_dim + b, head_dim / 4, shift));
    for (int t = 0; t < PAGE; t += 8)
        for (int word = 0; word < head_dim / 8; word += 8) {
            __m128i columns[8];
            transpose_words(rows[t] + 2 * word, MAX_HEAD_DIM / 4, columns);
            for (int i = 0; i < 8 && word + i < head_dim / 8; i++)
                _mm_storeu_si128((__m128i *)(out + 2 * (PAGE * (word + i) + t)), columns[i]);
        }
}

/* A channel and how wide it is: equal ranges are in the order of channels. */
struct spread {
    float range;
    int channel;
};

/* reference.widest_channels: marks the `count` channels of the widest range, and lists them in ascending order. */
static void choose_channels(int head_dim, const struct spread *spreads, int count, uint8_t *channels,
                            uint32_t *boosted) {
    struct spread best[MAX_HEAD_DIM]; /* the widest so far, widest first */
    int kept = 0;
    for (int c = 0; c < head_dim; c++) {
        int place = kept;
        while (place > 0 && best[place - 1].range < spreads[c].range) place--;
        if (place == count) continue;
        if (kept < count) kept++;
        memmove(best + place + 1, best + place, sizeof *best * (size_t)(kept - 1 - place));
        best[place] = spreads[c];
    }
    memset(boosted, 0, sizeof *boosted * (size_t)head_dim);
    for (int i = 0; i < count; i++) boosted[best[i].channel] = UINT32_MAX;
    for (int c = 0; c < head_dim; c++)
        if (boosted[c]) *channels++ = (uint8_t)c;
}

/* Ranges of all channels over tokens first .. tokens - 1; what is not finite is found by the fit. */
static void key_spreads(int head_dim, const uint16_t *keys, int64_t token_stride, int first, int tokens,
                        struct spread *out) {
    for (int c = 0; c < head_dim; c += 8) {
        __m128i ignored = _mm_setzero_si128();
        __m256 lo = _mm256_set1_ps(INFINITY), hi = _mm256_set1_ps(-INFINITY);
        for (int t = first; t < tokens; t++) {
            const __m256 x = load_clamped(keys + t * token_stride + c, &ignored);
            lo = _mm256_min_ps(lo, x);
            hi = _mm256_max_ps(hi, x);
        }
        ALIGNED float range[8];
        _mm256_store_ps(range, _mm256_sub_ps(hi, lo));
        for (int i = 0; i < 8; i++) out[c + i] = (struct spread){range[i], c + i};
    }
}

/* The codes of the boosted channels alone: [token][rank]. */
static void gather_codes(int head_dim, const uint8_t *codes, const uint8_t *channels, int count, uint8_t *out) {
    for (int t = 0; t < PAGE; t++)
        for (int i = 0; i < count; i++) out[t * count + i] = codes[t * head_dim + channels[i]];
}

/* Keys: a group is tokens of a channel, so lanes are channels. Returns whether all values are finite. */
static int quantize_keys(const struct page_format *f, int head_dim, const uint16_t *keys, int64_t token_stride,
                         int sinks, uint8_t *page) {
    ALIGNED float x[MAX_PAGE_TOKENS][8];
    ALIGNED uint8_t codes[MAX_PAGE_TOKENS * MAX_HEAD_DIM + 32]; /* [token][channel]; planar() reads 32 bytes on */
    ALIGNED uint32_t boosted[MAX_HEAD_DIM];                     /* all ones for a boosted channel */
    const struct tensor_format *k = &f->key;
    const int tokens = (int)f->tokens, group = (int)k->group, planes = planes_of(k), num_boosted = (int)k->boosted;
    const struct widths plain = widths_of(k->bits, k->unit_offset, k->zero_step);
    const struct widths wide = widths_of(k->bits + 2, k->boosted_unit_offset, k->boosted_zero_step);
    __m128i bad = _mm_setzero_si128();
    memset(codes + tokens * head_dim, 0, 32);
    if (num_boosted) {
        struct spread spreads[MAX_HEAD_DIM];
        key_spreads(head_dim, keys, token_stride, sinks, tokens, spreads);
        choose_channels(head_dim, spreads, num_boosted, page + k->channels, boosted);
        memset(page + k->channels + num_boosted, NO_CHANNEL, (size_t)(-num_boosted & 15)); /* up to 16 bytes */
    }
    for (int c = 0; c < head_dim; c += 8) {
        struct widths widths = plain;
        if (num_boosted) widths = blend_widths(plain, wide, _mm256_load_ps((const float *)(boosted + c)));
        for (int t = 0; t < tokens; t++) _mm256_store_ps(x[t], load_clamped(keys + t * token_stride + c, &bad));
        for (int begin = 0; begin < tokens; begin += group) {
            const int64_t index = begin / group * head_dim + c;
            struct fit fit = {.stored_scale = _mm_setzero_si128(), .stored_zero = _mm_setzero_si128()};
            if (begin + group > sinks) {
                fit = fit_groups((int)k->byte_scales, &widths, x, sinks > begin ? sinks : begin, begin + group);
                for (int t = begin; t < begin + group; t += 4)
                    store_codes(x, t, &fit, codes + t * head_dim + c, head_dim);
            }
            store_groups(k, page + k->scale, index, fit.stored_scale);
            store_groups(k, page + k->zero, index, fit.stored_zero);
        }
    }
    memset(codes, 0, (size_t)(sinks * head_dim));
    for (int tile = 0; tile < tokens / PAGE; tile++) {
        const uint8_t *tile_codes = codes + tile * PAGE * head_dim;
        for (int p = 0; p < planes; p++)
            pack_keys(head_dim, tile_codes, 2 * p, page + k->codes + (tile * planes + p) * PLANE_BYTES(head_dim));
        if (num_boosted) {
            ALIGNED uint8_t chosen[PAGE * MAX_HEAD_DIM + 32];
            gather_codes(head_dim, tile_codes, page + k->channels, num_boosted, chosen);
            memset(chosen + PAGE * num_boosted, 0, 32);
            pack_keys(num_boosted, chosen, (int)k->bits, page + k->boost + tile * PLANE_BYTES(num_boosted));
        }
    }
    return _mm_testz_si128(bad, bad);
}

/* One plane of a tile of value codes [channel][32 tokens]. */
static void pack_values(int head_dim, uint8_t (*codes)[PAGE], int shift, uint8_t *out) {
    ALIGNED uint8_t rows[MAX_HEAD_DIM / 4 + 4][PAGE]; /* [planar byte][token]; the last rows stay unused */
    const int row_bytes = head_dim / 4;
    for (int b = 0; b < row_bytes; b++)
        _mm256_store_si256((__m256i *)rows[b], planar(codes[b], (ptrdiff_t)row_bytes * PAGE, shift));
    memset(rows[row_bytes], 0, 4 * PAGE);
    /* Bytes [b][t] to [t][b]: pair up rows b, b + 1 as words, then transpose words. */
    for (int b = 0; b < row_bytes; b += 8)
        for (int t = 0; t < PAGE; t += 16) {
            __m128i pair[8], quad[8];
            UNROLL for (int i = 0; i < 4; i++) {
                __m128i even = _mm_load_si128((const __m128i *)(rows[b + 2 * i] + t));
                __m128i odd = _mm_load_si128((const __m128i *)(rows[b + 2 * i + 1] + t));
                pair[i] = _mm_unpacklo_epi8(even, odd);     /* tokens t .. t + 7 */
                pair[4 + i] = _mm_unpackhi_epi8(even, odd); /* tokens t + 8 .. t + 15 */
            }
            UNROLL for (int half = 0; half < 8; half += 4) {
                UNROLL for (int i = 0; i < 4; i += 2) {
                    quad[half + i] = _mm_unpacklo_epi16(pair[half + i], pair[half + i + 1]);
                    quad[half + i + 1] = _mm_unpackhi_epi16(pair[half + i], pair[half + i + 1]);
                }
                UNROLL for (int i = 0; i < 2; i++) { /* four tokens from each half of a register pair */
                    ALIGNED uint8_t four[4][8];
                    _mm_store_si128((__m128i *)four[0], _mm_unpacklo_epi32(quad[half + i], quad[half + i + 2]));
                    _mm_store_si128((__m128i *)four[2], _mm_unpackhi_epi32(quad[half + i], quad[half + i + 2]));
                    uint8_t *o = out + (t + 2 * half + 4 * i) * row_bytes + b;
                    UNROLL for (int k = 0; k < 4; k++) {
                        if (row_bytes - b >= 8)
                            memcpy(o + k * row_bytes, four[k], 8);
                        else
                            memcpy(o + k * row_bytes, four[k], 4);
                    }
                }
            }
        }
}

/* Values: a group is channels of a token, so lanes are tokens and x is transposed on the way in. */
static int quantize_values(const struct page_format *f, int head_dim, const uint16_t *values, int64_t token_stride,
                           int sinks, uint8_t *page) {
    ALIGNED float x[MAX_PAGE_TOKENS][8];       /* a group's channels: 128 at most, too */
    ALIGNED uint8_t codes[MAX_HEAD_DIM][PAGE]; /* [channel][token] of a tile */
    const int group = (int)f->value.group, groups = value_groups(f, head_dim), planes = planes_of(&f->value);
    const struct widths widths = widths_of(f->value.bits, f->value.unit_offset, f->value.zero_step);
    __m128i bad = _mm_setzero_si128();
    for (int tile = 0; tile < f->tokens / PAGE; tile++) {
        const int left_out = tile == 0 ? sinks : 0;
        for (int t = 0; t < PAGE; t += 8) {
            /* Of sinks, scale, zero point and codes are 0. */
            const __m128i lane = _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7);
            const __m128i sink = _mm_cmpgt_epi16(_mm_set1_epi16((short)(left_out - t)), lane);
            const uint16_t *tokens = values + (tile * PAGE + t) * token_stride;
            for (int n = 0; n < groups; n++) {
                const int begin = n * group, count = head_dim - begin < group ? head_dim - begin : group;
                for (int c = 0; c < count; c += 8) {
                    __m256 r[8];
                    UNROLL for (int i = 0; i < 8; i++) r[i] = load_clamped(tokens + i * token_stride + begin + c, &bad);
                    transpose8(r);
                    UNROLL for (int i = 0; i < 8; i++) _mm256_store_ps(x[c + i], r[i]);
                }
                const struct fit fit = fit_groups((int)f->value.byte_scales, &widths, x, 0, count);
                const int64_t index = (tile * groups + n) * PAGE + t;
                store_groups(&f->value, page + f->value.scale, index, _mm_andnot_si128(sink, fit.stored_scale));
                store_groups(&f->value, page + f->value.zero, index, _mm_andnot_si128(sink, fit.stored_zero));
                for (int c = 0; c < count; c += 4) store_codes(x, c, &fit, codes[begin + c] + t, PAGE);
            }
        }
        if (left_out)
            for (int c = 0; c < head_dim; c++) memset(codes[c], 0, (size_t)left_out);
        for (int p = 0; p < planes; p++)
            pack_values(head_dim, codes, 2 * p, page + f->value.codes + (tile * planes + p) * PLANE_BYTES(head_dim));
    }
    return _mm_testz_si128(bad, bad);
}

/* K or V of 16 bits: fp16 [token][D], with zeros for sinks. */
static int copy_half(int tokens, int head_dim, const uint16_t *x, int64_t token_stride, int sinks, uint8_t *out) {
    __m128i bad = _mm_setzero_si128();
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < head_dim; c += 8) {
            const __m128i h = load_checked(x + t * token_stride + c, &bad);
            _mm_storeu_si128((__m128i *)(out + 2 * (t * head_dim + c)), t < sinks ? _mm_setzero_si128() : h);
        }
    return _mm_testz_si128(bad, bad);
}

/* Item: the keys or the values of one page of one head. */
static void quantize_item(void *context, int64_t item) {
    struct quantize_call *call = context;
    const struct quantize_args *a = call->args;
    const struct page_format *f = &a->page;
    const int64_t page = item / 2 % a->pages, head = item / 2 / a->pages;
    const int head_dim = (int)a->head_dim, sinks = page == 0 ? (int)a->sink_tokens : 0;
    uint8_t *out = a->out + (head * a->pages + page) * f->bytes;
    int finite;
    if (item % 2) {
        const uint16_t *values = a->values + head * a->value_head_stride + page * f->tokens * a->value_token_stride;
        finite = f->value.bits == 16 ? copy_half((int)f->tokens, head_dim, values, a->value_token_stride, sinks,
                                                 out + f->value.codes)
                                     : quantize_values(f, head_dim, values, a->value_token_stride, sinks, out);
    } else {
        const uint16_t *keys = a->keys + head * a->key_head_stride + page * f->tokens * a->key_token_stride;
        finite = f->key.bits == 16
                     ? copy_half((int)f->tokens, head_dim, keys, a->key_token_stride, sinks, out + f->key.codes)
                     : quantize_keys(f, head_dim, keys, a->key_token_stride, sinks, out);
    }
    if (!finite) atomic_store_explicit(&call->not_finite, 1, memory_order_relaxed);
}

EXPORT const int kvferry_quantize_args_size = sizeof(struct quantize_args); /* native.py compares */

EXPORT int kvferry_quantize(const struct quantize_args *args) {
    if (!supported_head_dim(args->head_dim)) return STATUS_HEAD_DIM;
    struct quantize_call call = {args, 0};
    run_items(quantize_item, &call, 2 * args->pages * args->kv_heads, (int)args->threads);
    return call.not_finite ? STATUS_NOT_FINITE : STATUS_OK;
}
