/* Attention of a prefill chunk: fp16 sinks, packed prefix, then the chunk's own fp16 K and V, causal.
 *
 * A work item is a tile of query rows of one KV head. It walks the context 32 tokens at a time: a packed tile is
 * unpacked into an fp32 scratch that stays in L1 and is forgotten after its use: no copy of the prefix exists.
 * Rows are (position, query head of the group), so that a tile spans few positions, and go through the arithmetic in
 * sets of ROWS. A row's arithmetic does not depend on the other rows, on the number of rows or on the thread. */
#include <math.h>
#include <string.h>

#include "chunk_unpack.h"
#include "library.h"
#include "parallel.h"
#include "rule.h"

#define ROWS 6 /* rows a register tile: 6 x 16 fp32 accumulators and 3 more fill the 16 registers */
#define TILE_ROWS 96
#define LEAST_TILE_ROWS 24
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
    struct page_format page;
    struct score_rule rule;
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
    int64_t position[TILE_ROWS]; /* in the sequence; they ascend */
    int rows;                /* a multiple of ROWS */
};

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

/* All rows of the tile over the 32 tokens in its scratch, which begin at position `origin` of the sequence. A row sees
 * tokens first <= t < end that are no later than itself and inside its window. */
INLINE void attend_tokens(const int D, struct tile *tile, const struct score_rule *rule, int64_t origin, int first,
                          int end) {
    ALIGNED float scores[ROWS][PAGE];
    for (int row = 0; row < tile->rows; row += ROWS) {
        if (tile->position[row + ROWS - 1] < origin) continue;
        if (first_visible(rule, tile->position[row]) >= origin + end) continue;
        score_rows(D, tile->query + row * D, tile->keys, scores);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const int64_t position = tile->position[row + r] - origin;
            const int64_t seen = first_visible(rule, tile->position[row + r]) - origin;
            const int from = seen > first ? (int)(seen < PAGE ? seen : PAGE) : first;
            const int to = position + 1 < end ? (int)position + 1 : end;
            if (rule->softcap > 0)
                for (int t = 0; t < PAGE; t += 8)
                    _mm256_store_ps(scores[r] + t, cap_scores(_mm256_load_ps(scores[r] + t), rule->softcap));
            if (from > 0 || to < PAGE)
                for (int t = 0; t < PAGE; t++)
                    if (t < from || t >= to) scores[r][t] = -INFINITY;
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
    const int64_t prefix = a->num_blocks * a->block_size; /* position of the chunk's first token */
    const __m256 factor = _mm256_set1_ps(a->rule.scale * LOG2E);
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
        tile.position[r] = prefix + position;
    }

    /* Tokens before this no row of the tile sees: they are not read. */
    const int64_t visible = first_visible(&a->rule, tile.position[0]);
    const int sink_tokens = a->num_blocks ? (int)a->sink_tokens : 0;
    if (sink_tokens > visible) {
        const uint16_t *sinks = a->sinks + head * 2 * sink_tokens * D;
        load_half_keys(D, sinks, D, sink_tokens, tile.keys);
        load_half_values(D, sinks + sink_tokens * D, D, sink_tokens, tile.values);
        attend_tokens(D, &tile, &a->rule, 0, 0, sink_tokens);
    }
    for (int64_t origin = visible / PAGE * PAGE; origin < prefix; origin += PAGE) {
        const int64_t block = origin / a->block_size, offset = origin % a->block_size;
        const uint8_t *page = a->pool + a->table[block] * a->pool_block_stride + head * a->pool_head_stride +
                              offset / a->page.tokens * a->page.bytes;
        load_tile(D, &a->page, page, (int)(offset % a->page.tokens) / PAGE, tile.keys, tile.values);
        attend_tokens(D, &tile, &a->rule, origin, origin ? 0 : sink_tokens, PAGE);
    }
    const int64_t last = tile.position[tile.rows - 1] - prefix;
    for (int64_t origin = visible > prefix ? (visible - prefix) / PAGE * PAGE : 0; origin <= last; origin += PAGE) {
        const int count = a->tokens - origin < PAGE ? (int)(a->tokens - origin) : PAGE;
        const uint16_t *keys = a->keys + head * a->key_head_stride + origin * a->key_token_stride;
        const uint16_t *values = a->values + head * a->value_head_stride + origin * a->value_token_stride;
        load_half_keys(D, keys, a->key_token_stride, count, tile.keys);
        load_half_values(D, values, a->value_token_stride, count, tile.values);
        attend_tokens(D, &tile, &a->rule, prefix + origin, 0, count);
    }

    for (int r = 0; r < real_rows; r++) {
        const int64_t row = first_row + r, query_head = head * a->group + row % a->group;
        float *out = a->out + (query_head * a->tokens + row / a->group) * D;
        const __m256 sum = _mm256_set1_ps(sum8(tile.sum[r]));
        for (int c = 0; c < D; c += 8)
            _mm256_storeu_ps(out + c, _mm256_div_ps(_mm256_load_ps(tile.out + r * D + c), sum));
    }
}

#define SPECIALISE(D)                                                                  \
    static void attend_##D(const struct chunk_call *call, int64_t head, int64_t row) { \
        attend_chunk(D, call, head, row);                                              \
    }
SPECIALISE(32)
SPECIALISE(64)
SPECIALISE(80)
SPECIALISE(96)
SPECIALISE(128)
SPECIALISE(256)

/* Item: one tile of rows of one KV head. The last tiles see most of the chunk, so they go first. */
static void chunk_item(void *context, int64_t item) {
    const struct chunk_call *call = context;
    const int64_t head = item % call->args->kv_heads, tile = call->tiles - 1 - item / call->args->kv_heads;
    const int64_t row = tile * call->tile_rows;
    switch (call->args->head_dim) {
        case 32: attend_32(call, head, row); break;
        case 64: attend_64(call, head, row); break;
        case 80: attend_80(call, head, row); break;
        case 96: attend_96(call, head, row); break;
        case 128: attend_128(call, head, row); break;
        default: attend_256(call, head, row);
    }
}

EXPORT const int kvferry_chunk_args_size = sizeof(struct chunk_args); /* native.py compares */

EXPORT int kvferry_chunk(const struct chunk_args *a) {
    if (!supported_head_dim(a->head_dim)) return STATUS_HEAD_DIM;
    const int64_t visible = first_visible(&a->rule, a->num_blocks * a->block_size);
    for (int64_t i = visible / a->block_size; i < a->num_blocks; i++)
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
