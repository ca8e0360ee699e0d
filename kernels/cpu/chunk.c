/* Attention of a prefill chunk: fp16 sinks, packed prefix, then the chunk's own fp16 K and V, causal.
 *
 * A work item is a tile of query rows of one KV head. It walks the context 32 tokens at a time: a packed page is
 * unpacked into an fp32 scratch that stays in L1 and is forgotten after its use: no copy of the prefix exists.
 * Rows are (position, query head of the group), so that a tile spans few positions, and go through the arithmetic in
 * sets of ROWS. A row's arithmetic does not depend on the other rows, on the number of rows or on the thread. */
#include <math.h>
#include <string.h>

#include "library.h"
#include "page.h"
#include "parallel.h"
#include "simd.h"

#define ROWS 6 /* rows a register tile: 6 x 16 fp32 accumulators and 3 more fill the 16 registers */
#define TILE_ROWS 96
#define LEAST_TILE_ROWS 24
#define LOG2E 1.44269504f
#define LEAST_SCORE (-1e30f)
#define LAZY 8.0f /* see decode.c */

/* Strides count elements of their array: bytes for the pool. Pool and sinks point at the layer. */
struct chunk_args {
    const float *query;                 /* [Hq, n, D] */
    float *out;                         /* [Hq, n, D], contiguous */
    const uint16_t *keys, *values;      /* fp16 [H, n, D] */
    const uint8_t *pool;
    const uint16_t *sinks;              /* fp16 [H, 2, sink_tokens, D], contiguous */
    const int32_t *table;
    int64_t query_head_stride, query_token_stride;
    int64_t key_head_stride, key_token_stride, value_head_stride, value_token_stride;
    int64_t pool_blocks, pool_block_stride, pool_head_stride;
    int64_t num_blocks, kv_heads, group, tokens, head_dim, sink_tokens, block_size, threads;
    float scale;
};

struct chunk_call {
    const struct chunk_args *args;
    int64_t tile_rows, tiles; /* rows a tile; tiles a KV head */
};

struct tile {
    ALIGNED float query[TILE_ROWS * MAX_HEAD_DIM]; /* [row, D], times scale * log2(e) */
    ALIGNED float out[TILE_ROWS * MAX_HEAD_DIM];   /* [row, D], unnormalised */
    ALIGNED float keys[MAX_HEAD_DIM * PAGE];       /* [D, 32 tokens] */
    ALIGNED float values[PAGE * MAX_HEAD_DIM];     /* [32 tokens, D] */
    ALIGNED __m256 sum[TILE_ROWS];
    float max[TILE_ROWS];
    int position[TILE_ROWS]; /* of the row in the chunk */
    int rows;                /* a multiple of ROWS */
};

/* The four values of each code of eight groups, as vpermilps wants them: out[i] = group i's table, twice. */
INLINE void code_tables(const uint16_t *scale, const uint16_t *zero, __m256 out[8]) {
    const __m256 s = load_half8(scale), z = _mm256_add_ps(load_half8(zero), s);
    const __m256 step = _mm256_mul_ps(s, _mm256_set1_ps(1.0f / FOLD));
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

/* Field i of eight 32-bit lanes picks from a table: vpermilps looks at the two low bits only. */
INLINE __m256 look_up(__m256 table, __m256i codes, int shift) {
    return _mm256_permutevar_ps(table, shift ? _mm256_srli_epi32(codes, shift) : codes);
}

INLINE void unpack_keys(const int D, const uint8_t *page, float *keys) {
    ALIGNED float tables[MAX_HEAD_DIM][8];
    for (int c = 0; c < D; c += 8) {
        __m256 t[8];
        code_tables((const uint16_t *)(page + K_SCALE(D)) + c, (const uint16_t *)(page + K_ZERO(D)) + c, t);
        UNROLL for (int i = 0; i < 8; i++) _mm256_store_ps(tables[c + i], t[i]);
    }
    for (int word = 0; word < D / 8; word++)
        for (int t = 0; t < PAGE; t += 8) {
            const __m256i w = _mm256_cvtepu16_epi32(
                _mm_loadu_si128((const __m128i *)(page + K_CODES(D) + 2 * (PAGE * word + t))));
            UNROLL for (int byte = 0; byte < 2; byte++)
                UNROLL for (int i = 0; i < 4; i++) {
                    const int channel = i * (D / 4) + 2 * word + byte;
                    const __m256 table = _mm256_load_ps(tables[channel]);
                    _mm256_store_ps(keys + channel * PAGE + t, look_up(table, w, 8 * byte + 2 * i));
                }
        }
}

INLINE void unpack_values(const int D, const uint8_t *page, float *values) {
    for (int t = 0; t < PAGE; t += 8) {
        __m256 tables[MAX_HEAD_DIM / GROUP][8];
        UNROLL for (int n = 0; n < D / GROUP; n++)
            code_tables((const uint16_t *)(page + V_SCALE(D)) + PAGE * n + t,
                        (const uint16_t *)(page + V_ZERO(D)) + PAGE * n + t, tables[n]);
        for (int k = 0; k < 8; k++)
            UNROLL for (int b = 0; b < D / 4; b += 8) {
                const uint8_t *codes = page + V_CODES(D) + (t + k) * (D / 4) + b;
                const __m256i w = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
                UNROLL for (int i = 0; i < 4; i++) {
                    const int channel = i * (D / 4) + b;
                    _mm256_store_ps(values + (t + k) * D + channel, look_up(tables[channel / GROUP][k], w, 2 * i));
                }
            }
    }
}

/* `count` fp16 tokens, 1 to 32, into the scratch; the rest of it becomes 0. */
INLINE void load_half(const int D, const uint16_t *keys, int64_t key_stride, const uint16_t *values,
                      int64_t value_stride, int count, struct tile *tile) {
    static const uint16_t zeros[MAX_HEAD_DIM];
    for (int t = 0; t < PAGE; t += 8)
        for (int c = 0; c < D; c += 8) {
            __m256 r[8];
            UNROLL for (int i = 0; i < 8; i++) {
                r[i] = load_half8(t + i < count ? keys + (t + i) * key_stride + c : zeros);
                const uint16_t *v = t + i < count ? values + (t + i) * value_stride + c : zeros;
                _mm256_store_ps(tile->values + (t + i) * D + c, load_half8(v));
            }
            transpose8(r);
            UNROLL for (int i = 0; i < 8; i++) _mm256_store_ps(tile->keys + (c + i) * PAGE + t, r[i]);
        }
}

/* scores[6, 32] = query[6, D] x keys[D, 32] */
INLINE void score_rows(const int D, const float *query, const float *keys, float scores[ROWS][PAGE]) {
    UNROLL for (int t = 0; t < PAGE; t += 16) {
        __m256 acc[ROWS][2];
        UNROLL for (int r = 0; r < ROWS; r++) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
        for (int c = 0; c < D; c++) {
            const __m256 k0 = _mm256_load_ps(keys + c * PAGE + t), k1 = _mm256_load_ps(keys + c * PAGE + t + 8);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const __m256 q = _mm256_broadcast_ss(query + r * D + c);
                acc[r][0] = _mm256_fmadd_ps(q, k0, acc[r][0]);
                acc[r][1] = _mm256_fmadd_ps(q, k1, acc[r][1]);
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            _mm256_store_ps(scores[r] + t, acc[r][0]);
            _mm256_store_ps(scores[r] + t + 8, acc[r][1]);
        }
    }
}

/* out[6, D] += probabilities[6, 32] x values[32, D] */
INLINE void add_values(const int D, float probabilities[ROWS][PAGE], const float *values, float *out) {
    for (int c = 0; c < D; c += 16) {
        __m256 acc[ROWS][2];
        UNROLL for (int r = 0; r < ROWS; r++) {
            acc[r][0] = _mm256_load_ps(out + r * D + c);
            acc[r][1] = _mm256_load_ps(out + r * D + c + 8);
        }
        for (int t = 0; t < PAGE; t++) {
            const __m256 v0 = _mm256_load_ps(values + t * D + c), v1 = _mm256_load_ps(values + t * D + c + 8);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const __m256 p = _mm256_broadcast_ss(&probabilities[r][t]);
                acc[r][0] = _mm256_fmadd_ps(p, v0, acc[r][0]);
                acc[r][1] = _mm256_fmadd_ps(p, v1, acc[r][1]);
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            _mm256_store_ps(out + r * D + c, acc[r][0]);
            _mm256_store_ps(out + r * D + c + 8, acc[r][1]);
        }
    }
}

/* Scores of one row to probabilities, in place: online softmax. */
INLINE void soften_row(const int D, struct tile *tile, int row, float scores[PAGE]) {
    __m256 x[4];
    UNROLL for (int k = 0; k < 4; k++) x[k] = _mm256_load_ps(scores + 8 * k);
    const __m256 most = _mm256_max_ps(_mm256_max_ps(x[0], x[1]), _mm256_max_ps(x[2], x[3]));
    if (_mm256_movemask_ps(_mm256_cmp_ps(most, _mm256_set1_ps(tile->max[row] + LAZY), _CMP_GT_OQ))) {
        const float max = max8(most);
        const __m256 factor = _mm256_set1_ps(exp2_scalar(tile->max[row] - max));
        float *out = tile->out + row * D;
        for (int c = 0; c < D; c += 8) _mm256_store_ps(out + c, _mm256_mul_ps(_mm256_load_ps(out + c), factor));
        tile->sum[row] = _mm256_mul_ps(tile->sum[row], factor);
        tile->max[row] = max;
    }
    const __m256 max = _mm256_set1_ps(tile->max[row]);
    UNROLL for (int k = 0; k < 4; k++) {
        x[k] = exp2_ps(_mm256_sub_ps(x[k], max));
        _mm256_store_ps(scores + 8 * k, x[k]);
    }
    const __m256 sum = _mm256_add_ps(_mm256_add_ps(x[0], x[1]), _mm256_add_ps(x[2], x[3]));
    tile->sum[row] = _mm256_add_ps(tile->sum[row], sum);
}

/* All rows of the tile over the 32 tokens in its scratch. A row sees tokens first <= t < end, and when `causal` also
 * t <= position - origin. */
INLINE void attend_tokens(const int D, struct tile *tile, int first, int end, const int causal, int origin) {
    ALIGNED float scores[ROWS][PAGE];
    for (int row = 0; row < tile->rows; row += ROWS) {
        if (causal && tile->position[row + ROWS - 1] < origin) continue; /* positions ascend */
        score_rows(D, tile->query + row * D, tile->keys, scores);
        UNROLL for (int r = 0; r < ROWS; r++) {
            int visible = end;
            if (causal && tile->position[row + r] - origin + 1 < end) visible = tile->position[row + r] - origin + 1;
            if (first > 0 || visible < PAGE)
                for (int t = 0; t < PAGE; t++)
                    if (t < first || t >= visible) scores[r][t] = -INFINITY;
            soften_row(D, tile, row + r, scores[r]);
        }
        add_values(D, scores, tile->values, tile->out + row * D);
    }
}

INLINE void attend_chunk(const int D, const struct chunk_call *call, int64_t head, int64_t first_row) {
    const struct chunk_args *a = call->args;
    const int64_t all_rows = a->tokens * a->group;
    struct tile tile;
    const int real_rows = (int)(all_rows - first_row < call->tile_rows ? all_rows - first_row : call->tile_rows);
    tile.rows = (real_rows + ROWS - 1) / ROWS * ROWS;
    const __m256 factor = _mm256_set1_ps(a->scale * LOG2E);
    for (int r = 0; r < tile.rows; r++) {
        const int64_t row = first_row + (r < real_rows ? r : real_rows - 1); /* the last row again fills the set */
        const int64_t position = row / a->group, query_head = head * a->group + row % a->group;
        const float *query = a->query + query_head * a->query_head_stride + position * a->query_token_stride;
        for (int c = 0; c < D; c += 8) {
            _mm256_store_ps(tile.query + r * D + c, _mm256_mul_ps(_mm256_loadu_ps(query + c), factor));
            _mm256_store_ps(tile.out + r * D + c, _mm256_setzero_ps());
        }
        tile.sum[r] = _mm256_setzero_ps();
        tile.max[r] = LEAST_SCORE;
        tile.position[r] = (int)position;
    }

    const int sink_tokens = a->num_blocks ? (int)a->sink_tokens : 0;
    if (sink_tokens) {
        const uint16_t *sinks = a->sinks + head * 2 * sink_tokens * D;
        load_half(D, sinks, D, sinks + sink_tokens * D, D, sink_tokens, &tile);
        attend_tokens(D, &tile, 0, sink_tokens, 0, 0);
    }
    const int pages_per_block = (int)(a->block_size / PAGE);
    for (int64_t block = 0; block < a->num_blocks; block++)
        for (int i = 0; i < pages_per_block; i++) {
            const uint8_t *page = a->pool + a->table[block] * a->pool_block_stride + head * a->pool_head_stride +
                                  (int64_t)i * PAGE_BYTES(D);
            unpack_keys(D, page, tile.keys);
            unpack_values(D, page, tile.values);
            attend_tokens(D, &tile, block == 0 && i == 0 ? sink_tokens : 0, PAGE, 0, 0);
        }
    const int last = tile.position[tile.rows - 1];
    for (int origin = 0; origin <= last; origin += PAGE) {
        const int count = a->tokens - origin < PAGE ? (int)(a->tokens - origin) : PAGE;
        const uint16_t *keys = a->keys + head * a->key_head_stride + origin * a->key_token_stride;
        const uint16_t *values = a->values + head * a->value_head_stride + origin * a->value_token_stride;
        load_half(D, keys, a->key_token_stride, values, a->value_token_stride, count, &tile);
        attend_tokens(D, &tile, 0, count, 1, origin);
    }

    for (int r = 0; r < real_rows; r++) {
        const int64_t row = first_row + r, query_head = head * a->group + row % a->group;
        float *out = a->out + (query_head * a->tokens + row / a->group) * D;
        const __m256 sum = _mm256_set1_ps(sum8(tile.sum[r]));
        for (int c = 0; c < D; c += 8)
            _mm256_storeu_ps(out + c, _mm256_div_ps(_mm256_load_ps(tile.out + r * D + c), sum));
    }
}

static void attend_32(const struct chunk_call *call, int64_t head, int64_t row) { attend_chunk(32, call, head, row); }
static void attend_64(const struct chunk_call *call, int64_t head, int64_t row) { attend_chunk(64, call, head, row); }
static void attend_96(const struct chunk_call *call, int64_t head, int64_t row) { attend_chunk(96, call, head, row); }
static void attend_128(const struct chunk_call *call, int64_t head, int64_t row) { attend_chunk(128, call, head, row); }

/* Item: one tile of rows of one KV head. The last tiles see most of the chunk, so they go first. */
static void chunk_item(void *context, int64_t item) {
    static void (*const attend[])(const struct chunk_call *, int64_t, int64_t) = {attend_32, attend_64, attend_96,
                                                                                  attend_128};
    const struct chunk_call *call = context;
    const int64_t head = item % call->args->kv_heads, tile = call->tiles - 1 - item / call->args->kv_heads;
    attend[call->args->head_dim / 32 - 1](call, head, tile * call->tile_rows);
}

EXPORT const int kvferry_chunk_args_size = sizeof(struct chunk_args); /* native.py compares */

EXPORT int kvferry_chunk(const struct chunk_args *a) {
    if (a->head_dim % 32 || a->head_dim < 32 || a->head_dim > MAX_HEAD_DIM) return STATUS_HEAD_DIM;
    for (int64_t i = 0; i < a->num_blocks; i++)
        if (a->table[i] < 0 || a->table[i] >= a->pool_blocks) return STATUS_BLOCK_ID;
    const int64_t rows = a->tokens * a->group;
    struct chunk_call call = {.args = a, .tile_rows = TILE_ROWS};
    for (;; call.tile_rows /= 2) { /* smaller tiles unpack more often, but keep every thread busy */
        call.tiles = (rows + call.tile_rows - 1) / call.tile_rows;
        if (call.tiles * a->kv_heads >= 3 * a->threads || call.tile_rows <= LEAST_TILE_ROWS) break;
    }
    run_items(chunk_item, &call, call.tiles * a->kv_heads, (int)a->threads);
    return STATUS_OK;
}
