/* Quantize and pack: fit_groups and join_page of the reference, eight groups at a time. */
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#include "library.h"
#include "page.h"
#include "parallel.h"
#include "simd.h"

#define FIT_SHRINK 0.8
#define FIT_STEPS 2
#define MIN_FOLDED_SCALE 0x1p-14f
#define MAX_FOLDED 65504.0f
#define LIMIT 16384.0f

/* One layer of one block. Strides count elements; a row is contiguous. */
struct quantize_args {
    const uint16_t *keys, *values; /* fp16 [H, T, D] */
    uint8_t *out;                  /* [H, T / 32, page bytes] */
    int64_t key_head_stride, key_token_stride, value_head_stride, value_token_stride;
    int64_t kv_heads, pages, head_dim, sink_tokens, threads;
};

struct quantize_call {
    const struct quantize_args *args;
    _Atomic int not_finite;
};

/* How eight groups (one a lane) become codes. */
struct fit {
    __m128i folded_scale, folded_zero; /* fp16 */
    __m256 zero, inverse;
};

INLINE __m256 inverse_of(__m256 scale) {
    const __m256 smallest = _mm256_set1_ps(MIN_FOLDED_SCALE / FOLD);
    return _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_max_ps(scale, smallest));
}

INLINE __m256 nearest_code(__m256 x, __m256 zero, __m256 inverse) {
    __m256 c = _mm256_mul_ps(_mm256_sub_ps(x, zero), inverse);
    c = _mm256_round_ps(c, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_min_ps(_mm256_max_ps(c, _mm256_setzero_ps()), _mm256_set1_ps(3.0f));
}

/* Least squares in the style of Lloyd: see fit_groups in reference.py. Rows before `first` do not count. */
static struct fit fit_groups(float (*x)[8], int first) {
    __m256 lo = _mm256_load_ps(x[first]), hi = lo, sum = _mm256_setzero_ps();
    for (int t = first; t < PAGE; t++) {
        __m256 v = _mm256_load_ps(x[t]);
        lo = _mm256_min_ps(lo, v);
        hi = _mm256_max_ps(hi, v);
        sum = _mm256_add_ps(sum, v);
    }
    const __m256 count = _mm256_set1_ps((float)(PAGE - first));
    const __m256 mean_x = _mm256_div_ps(sum, count);
    __m256 scale = _mm256_mul_ps(_mm256_sub_ps(hi, lo), _mm256_set1_ps((float)(FIT_SHRINK / 3.0)));
    __m256 zero = _mm256_sub_ps(_mm256_mul_ps(_mm256_add_ps(lo, hi), _mm256_set1_ps(0.5f)),
                                _mm256_mul_ps(_mm256_set1_ps(1.5f), scale));
    for (int step = 0; step < FIT_STEPS; step++) {
        const __m256 inverse = inverse_of(scale);
        __m256 c1 = _mm256_setzero_ps(), c2 = c1, y1 = c1, cy = c1; /* sums of c, c^2, x - mean_x, c (x - mean_x) */
        for (int t = first; t < PAGE; t++) {
            __m256 v = _mm256_load_ps(x[t]);
            __m256 c = nearest_code(v, zero, inverse);
            __m256 y = _mm256_sub_ps(v, mean_x);
            c1 = _mm256_add_ps(c1, c);
            c2 = _mm256_fmadd_ps(c, c, c2);
            y1 = _mm256_add_ps(y1, y);
            cy = _mm256_fmadd_ps(c, y, cy);
        }
        const __m256 mean_c = _mm256_div_ps(c1, count);
        /* count times the sum of squared deviations: small integers, so exact and exactly 0 for one-code groups. */
        const __m256 spread = _mm256_fmsub_ps(count, c2, _mm256_mul_ps(c1, c1));
        const __m256 covariance = _mm256_fnmadd_ps(mean_c, y1, cy);
        const __m256 fitted = _mm256_div_ps(_mm256_mul_ps(covariance, count), spread);
        scale = _mm256_blendv_ps(scale, fitted, _mm256_cmp_ps(spread, _mm256_setzero_ps(), _CMP_GT_OQ));
        zero = _mm256_sub_ps(mean_x, _mm256_mul_ps(scale, mean_c));
    }
    const __m256 most = _mm256_set1_ps(MAX_FOLDED), least = _mm256_set1_ps(-MAX_FOLDED);
    struct fit fit;
    __m256 s = _mm256_mul_ps(scale, _mm256_set1_ps(FOLD));
    s = _mm256_min_ps(_mm256_max_ps(s, _mm256_set1_ps(MIN_FOLDED_SCALE)), most);
    fit.folded_scale = _mm256_cvtps_ph(s, _MM_FROUND_TO_NEAREST_INT);
    s = _mm256_cvtph_ps(fit.folded_scale);
    __m256 z = _mm256_min_ps(_mm256_max_ps(_mm256_sub_ps(zero, s), least), most);
    fit.folded_zero = _mm256_cvtps_ph(z, _MM_FROUND_TO_NEAREST_INT);
    fit.zero = _mm256_add_ps(_mm256_cvtph_ps(fit.folded_zero), s);
    fit.inverse = inverse_of(_mm256_mul_ps(s, _mm256_set1_ps(1.0f / FOLD)));
    return fit;
}

/* Codes of rows t .. t + 3, each 8 bytes long, to out[0], out[stride], ... */
INLINE void store_codes(float (*x)[8], int t, const struct fit *fit, uint8_t *out, ptrdiff_t stride) {
    __m256i c[4];
    UNROLL for (int i = 0; i < 4; i++)
        c[i] = _mm256_cvtps_epi32(nearest_code(_mm256_load_ps(x[t + i]), fit->zero, fit->inverse));
    __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
    bytes = unpacked_order(bytes);
    __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
    _mm_storel_epi64((__m128i *)out, low);
    _mm_storeh_pd((double *)(out + stride), _mm_castsi128_pd(low));
    _mm_storel_epi64((__m128i *)(out + 2 * stride), high);
    _mm_storeh_pd((double *)(out + 3 * stride), _mm_castsi128_pd(high));
}

/* Eight fp16 as clamped fp32. `bad` collects lanes whose exponent is all ones: infinity or NaN. */
INLINE __m256 load_checked(const uint16_t *p, __m128i *bad) {
    const __m128i exponent = _mm_set1_epi16(0x7C00);
    __m128i h = _mm_loadu_si128((const __m128i *)p);
    *bad = _mm_or_si128(*bad, _mm_cmpeq_epi16(_mm_and_si128(h, exponent), exponent));
    return _mm256_min_ps(_mm256_max_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(-LIMIT)), _mm256_set1_ps(LIMIT));
}

/* Four rows of codes, `plane` bytes apart, as one row of planar bytes. */
INLINE __m256i planar(const uint8_t *codes, ptrdiff_t plane) {
    __m256i r = _mm256_loadu_si256((const __m256i *)codes);
    UNROLL for (int i = 1; i < 4; i++) {
        __m256i c = _mm256_loadu_si256((const __m256i *)(codes + i * plane));
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

/* Keys: a group is 32 tokens of a channel, so lanes are channels. Returns whether all values are finite. */
static int quantize_keys(int head_dim, const uint16_t *keys, int64_t token_stride, int first, uint8_t *page) {
    ALIGNED float x[PAGE][8];
    ALIGNED uint8_t codes[PAGE * MAX_HEAD_DIM + 32]; /* [token][channel]; planar() reads up to 32 bytes on */
    ALIGNED uint8_t rows[PAGE][32];                  /* [token][planar byte] */
    __m128i bad = _mm_setzero_si128();
    memset(codes + PAGE * head_dim, 0, 32);
    for (int c = 0; c < head_dim; c += 8) {
        for (int t = 0; t < PAGE; t++) _mm256_store_ps(x[t], load_checked(keys + t * token_stride + c, &bad));
        struct fit fit = fit_groups(x, first);
        _mm_storeu_si128((__m128i *)(page + K_SCALE(head_dim) + 2 * c), fit.folded_scale);
        _mm_storeu_si128((__m128i *)(page + K_ZERO(head_dim) + 2 * c), fit.folded_zero);
        for (int t = 0; t < PAGE; t += 4) store_codes(x, t, &fit, codes + t * head_dim + c, head_dim);
    }
    memset(codes, 0, (size_t)(first * head_dim));
    for (int t = 0; t < PAGE; t++)
        _mm256_store_si256((__m256i *)rows[t], planar(codes + t * head_dim, head_dim / 4));
    for (int t = 0; t < PAGE; t += 8)
        for (int word = 0; word < head_dim / 8; word += 8) {
            __m128i columns[8];
            transpose_words(rows[t] + 2 * word, 32, columns);
            for (int i = 0; i < 8 && word + i < head_dim / 8; i++)
                _mm_storeu_si128((__m128i *)(page + K_CODES(head_dim) + 2 * (PAGE * (word + i) + t)), columns[i]);
        }
    return _mm_testz_si128(bad, bad);
}

/* Values: a group is 32 channels of a token, so lanes are tokens and x is transposed on the way in. */
static int quantize_values(int head_dim, const uint16_t *values, int64_t token_stride, int first, uint8_t *page) {
    ALIGNED float x[GROUP][8];
    ALIGNED uint8_t codes[MAX_HEAD_DIM][PAGE]; /* [channel][token] */
    ALIGNED uint8_t rows[MAX_HEAD_DIM / 4][PAGE];
    __m128i bad = _mm_setzero_si128();
    for (int t = 0; t < PAGE; t += 8) {
        /* Tokens before `first` are sinks: scale, zero point and codes are 0. */
        const __m128i lane = _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7);
        const __m128i sink = _mm_cmpgt_epi16(_mm_set1_epi16((short)(first - t)), lane);
        for (int group = 0; group < head_dim / GROUP; group++) {
            for (int c = 0; c < GROUP; c += 8) {
                __m256 r[8];
                UNROLL for (int i = 0; i < 8; i++)
                    r[i] = load_checked(values + (t + i) * token_stride + group * GROUP + c, &bad);
                transpose8(r);
                UNROLL for (int i = 0; i < 8; i++) _mm256_store_ps(x[c + i], r[i]);
            }
            struct fit fit = fit_groups(x, 0);
            const int column = 2 * (PAGE * group + t);
            _mm_storeu_si128((__m128i *)(page + V_SCALE(head_dim) + column), _mm_andnot_si128(sink, fit.folded_scale));
            _mm_storeu_si128((__m128i *)(page + V_ZERO(head_dim) + column), _mm_andnot_si128(sink, fit.folded_zero));
            for (int c = 0; c < GROUP; c += 4) store_codes(x, c, &fit, codes[group * GROUP + c] + t, PAGE);
        }
    }
    if (first)
        for (int c = 0; c < head_dim; c++) memset(codes[c], 0, (size_t)first);
    for (int b = 0; b < head_dim / 4; b++)
        _mm256_store_si256((__m256i *)rows[b], planar(codes[b], (ptrdiff_t)head_dim / 4 * PAGE));
    /* Bytes [b][t] to [t][b]: pair up rows b, b + 1 as words, then transpose words. */
    for (int b = 0; b < head_dim / 4; b += 8)
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
                    __m128i low = _mm_unpacklo_epi32(quad[half + i], quad[half + i + 2]);
                    __m128i high = _mm_unpackhi_epi32(quad[half + i], quad[half + i + 2]);
                    uint8_t *o = page + V_CODES(head_dim) + (t + 2 * half + 4 * i) * (head_dim / 4) + b;
                    _mm_storel_epi64((__m128i *)o, low);
                    _mm_storeh_pd((double *)(o + head_dim / 4), _mm_castsi128_pd(low));
                    _mm_storel_epi64((__m128i *)(o + 2 * (head_dim / 4)), high);
                    _mm_storeh_pd((double *)(o + 3 * (head_dim / 4)), _mm_castsi128_pd(high));
                }
            }
        }
    return _mm_testz_si128(bad, bad);
}

/* Item: the keys or the values of one page of one head. */
static void quantize_item(void *context, int64_t item) {
    struct quantize_call *call = context;
    const struct quantize_args *a = call->args;
    const int64_t page = item / 2 % a->pages, head = item / 2 / a->pages;
    const int head_dim = (int)a->head_dim;
    const int first = page == 0 ? (int)a->sink_tokens : 0;
    uint8_t *out = a->out + (head * a->pages + page) * PAGE_BYTES(head_dim);
    const uint16_t *keys = a->keys + head * a->key_head_stride + page * PAGE * a->key_token_stride;
    const uint16_t *values = a->values + head * a->value_head_stride + page * PAGE * a->value_token_stride;
    const int finite = item % 2 ? quantize_values(head_dim, values, a->value_token_stride, first, out)
                                : quantize_keys(head_dim, keys, a->key_token_stride, first, out);
    if (!finite) atomic_store_explicit(&call->not_finite, 1, memory_order_relaxed);
}

EXPORT const int kvferry_quantize_args_size = sizeof(struct quantize_args); /* native.py compares */

EXPORT int kvferry_quantize(const struct quantize_args *args) {
    if (args->head_dim % GROUP || args->head_dim < GROUP || args->head_dim > MAX_HEAD_DIM) return STATUS_HEAD_DIM;
    struct quantize_call call = {args, 0};
    run_items(quantize_item, &call, 2 * args->pages * args->kv_heads, (int)args->threads);
    return call.not_finite ? STATUS_NOT_FINITE : STATUS_OK;
}
