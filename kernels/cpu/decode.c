/* Paged fused dequant-attention for decode.
 *
 * Codes are multiplied as they are, by vpmaddubsw: scales are folded into the query (K) and into the probabilities (V),
 * which are then split into TERMS 8-bit terms: two (error about 2e-4), or one, which is faster (about 4e-2). Zero
 * points become a bias of the score and a sum of probabilities. Wider codes are planes of two bits, each worth four
 * times the one before. K and V of codes never exist in floating point.
 *
 * A context is cut into pieces that depend on its own length alone: first the fp16 tokens (sinks and tail), then
 * runs of packed pages. A work item is a piece of one KV head, for all its query heads; whoever finishes the
 * last piece of a head merges them in order. So a result has the same bits whatever else is in the batch and however
 * many threads run. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "decode_half.h"
#include "decode_keys.h"
#include "decode_values.h"
#include "library.h"
#include "parallel.h"

/* Tiles of a piece at least, and pieces of a sequence at most: partial results stay small against a long context. */
#define PIECE_TILES 16
#define MAX_PIECES 32
/* Tile-heads that one thread computes in less time (15 us) than a second thread may take to join. */
#define SERIAL_WORK 128

/* Strides count elements of their array: bytes for the pool, else fp16 or int32. Pool, sinks and tails point at the
 * layer. */
struct decode_args {
    const float *query; /* [B, Hq, D] */
    float *out;         /* [B, Hq, D]; with `shares`, [B, Hq, D + 1]: then log2 of the sum of exponentials */
    const uint8_t *pool;
    const uint16_t *sinks, *tails;
    const int32_t *block_tables, *num_blocks, *slots, *tail_lens;
    int64_t pool_blocks, pool_block_stride, pool_head_stride;
    int64_t num_slots, sinks_slot_stride, sinks_head_stride;
    int64_t tails_slot_stride, tails_value_offset, tails_head_stride;
    int64_t table_stride, batch, kv_heads, group, head_dim, sink_tokens, block_size, threads, terms, shares;
    struct page_format page;
    struct score_rule rule;
};

struct decode_call {
    const struct decode_args *args;
    int64_t *first_piece;    /* [B + 1]: running sum of the sequences' pieces */
    _Atomic int *unfinished; /* [B, H]: pieces to go */
    float *partials;         /* [piece, H, group, D + 2]: unnormalised output, maximum, sum */
};

/* Where a piece's packed pages lie. */
struct pages {
    const struct page_format *format;
    const uint8_t *pool; /* at the layer and head */
    const int32_t *table;
    int64_t block_stride;
    int pages_per_block, begin, end;
    int64_t unseen; /* positions before this are masked: sinks, or outside the window */
    float softcap;
};

INLINE const uint8_t *page_at(const struct pages *p, int index) {
    const int block = index / p->pages_per_block, page = index - block * p->pages_per_block;
    return p->pool + p->table[block] * p->block_stride + page * p->format->bytes;
}

INLINE void prefetch(const uint8_t *page, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)page + i, _MM_HINT_T0);
}

/* Formats with code of their own: 2 bits in groups of 32 with fp16 scales, the preset kv2, and any other. */
enum kind { ANY, PLAIN, KV2 };
#define NUM_KINDS 3

/* A format with what its kind decides as constants. */
INLINE struct page_format with_constants(const int KIND, const struct page_format *f) {
    struct page_format c = *f;
    if (KIND == ANY) return c;
    c.key.bits = c.value.bits = 2;
    c.tokens = KIND == PLAIN ? PAGE : 128;
    c.key.group = KIND == PLAIN ? 32 : 128;
    c.value.group = KIND == PLAIN ? 32 : 64;
    c.key.byte_scales = c.value.byte_scales = KIND != PLAIN;
    c.key.unit_offset = c.value.unit_offset = 1.0f;
    c.key.zero_step = c.value.zero_step = 1.0f / 32.0f;
    if (KIND == PLAIN) c.key.boosted = 0;
    return c;
}

static enum kind kind_of(const struct page_format *f) {
    const struct tensor_format *k = &f->key, *v = &f->value;
    if (k->bits != 2 || v->bits != 2 || k->byte_scales != v->byte_scales) return ANY;
    if (!k->byte_scales) return k->group == 32 && v->group == 32 && !k->boosted ? PLAIN : ANY;
    return k->group == 128 && v->group == 64 ? KV2 : ANY;
}

/* A piece for GB heads. `query` is [GB, D], times scale * log2(e). */
INLINE void attend_pages(const int KIND, const int D, const int GB, const int TERMS, const struct pages *pages,
                         const float *query, float *partials) {
    ALIGNED float scores[HEADS][PAGE];
    const struct page_format constants = with_constants(KIND, pages->format), *f = &constants;
    const int tiles = (int)f->tokens / PAGE, shift = __builtin_ctz((unsigned)f->value.group / 16);
    struct folded_queries folded;
    struct weights weights;
    struct state s;
    reset(&s, f->value.bits == 16 ? 0 : value_groups(f, D));
    const uint8_t *next = page_at(pages, pages->begin);
    for (int i = pages->begin; i < pages->end; i++) {
        const uint8_t *page = next;
        if (i + 1 < pages->end) { /* the pool is seldom in cache */
            next = page_at(pages, i + 1);
            prefetch(next, f->bytes);
        }
        for (int tile = 0; tile < tiles; tile++) {
            tile_scores(D, GB, TERMS, f, page, tile, query, &folded, scores);
            if (pages->softcap > 0)
                for (int g = 0; g < GB; g++)
                    for (int t = 0; t < PAGE; t += 8)
                        _mm256_store_ps(scores[g] + t, cap_scores(_mm256_load_ps(scores[g] + t), pages->softcap));
            const int64_t unseen = pages->unseen - ((int64_t)i * tiles + tile) * PAGE;
            if (unseen > 0)
                for (int g = 0; g < GB; g++)
                    for (int t = 0; t < PAGE && t < unseen; t++) scores[g][t] = -INFINITY;
            add_tile(D, GB, TERMS, f, page, tile, shift, scores, &s, &weights);
        }
    }
    for (int g = 0; g < GB; g++) store_partial(D, &s, g, shift, partials + g * (D + 2));
}

typedef void (*pages_fn)(const struct pages *, const float *, float *);
typedef void (*half_fn)(const struct half_run[2], float, const float *, float *);

#define SPECIALISE_KIND(KIND, D, GB)                                                                          \
    static void KIND##_one_term_##D##_##GB(const struct pages *pages, const float *query, float *partials) {  \
        attend_pages(KIND, D, GB, 1, pages, query, partials);                                                 \
    }                                                                                                         \
    static void KIND##_two_terms_##D##_##GB(const struct pages *pages, const float *query, float *partials) { \
        attend_pages(KIND, D, GB, 2, pages, query, partials);                                                 \
    }
#define SPECIALISE_HALF(D, GB)                                                                    \
    static void half_##D##_##GB(const struct half_run runs[2], float softcap, const float *query, \
                                float *partials) {                                                \
        attend_half(D, GB, runs, softcap, query, partials);                                       \
    }
#define FOR_HEADS(MACRO, ...) MACRO(__VA_ARGS__, 1) MACRO(__VA_ARGS__, 2) MACRO(__VA_ARGS__, 3) MACRO(__VA_ARGS__, 4)
#define SPECIALISE(D) FOR_HEADS(SPECIALISE_KIND, ANY, D) FOR_HEADS(SPECIALISE_HALF, D)
#define SPECIALISE_COMMON(D) \
    SPECIALISE(D) FOR_HEADS(SPECIALISE_KIND, PLAIN, D) FOR_HEADS(SPECIALISE_KIND, KV2, D)
SPECIALISE(32)
SPECIALISE_COMMON(64)
SPECIALISE(80)
SPECIALISE(96)
SPECIALISE_COMMON(128)
SPECIALISE(256)

#define NUM_HEAD_DIMS 6
#define ROW(name, D) {name##_##D##_1, name##_##D##_2, name##_##D##_3, name##_##D##_4}
#define TABLE(name) \
    {ROW(name, 32), ROW(name, 64), ROW(name, 80), ROW(name, 96), ROW(name, 128), ROW(name, 256)}
#define COMMON_TABLE(kind, name)                                                                       \
    {ROW(ANY_##name, 32), ROW(kind##_##name, 64), ROW(ANY_##name, 80), ROW(ANY_##name, 96),            \
     ROW(kind##_##name, 128), ROW(ANY_##name, 256)}
static const pages_fn attend_pages_of[NUM_KINDS][2][NUM_HEAD_DIMS][HEADS] = {
    {TABLE(ANY_one_term), TABLE(ANY_two_terms)},
    {COMMON_TABLE(PLAIN, one_term), COMMON_TABLE(PLAIN, two_terms)},
    {COMMON_TABLE(KV2, one_term), COMMON_TABLE(KV2, two_terms)},
};
static const half_fn attend_half_of[NUM_HEAD_DIMS][HEADS] = TABLE(half);

/* Row of a head dimension in the tables. */
static int row_of(int head_dim) {
    static const int head_dims[NUM_HEAD_DIMS] = {32, 64, 80, 96, 128, 256};
    int row = 0;
    while (head_dims[row] != head_dim) row++;
    return row;
}

/* Merges the partials of one KV head, in the order of pieces. Without any token the result is 0. */
static void merge_pieces(const struct decode_call *call, int64_t sequence, int64_t head) {
    const struct decode_args *a = call->args;
    const int64_t D = a->head_dim, begin = call->first_piece[sequence], end = call->first_piece[sequence + 1];
    const int64_t stride = a->kv_heads * a->group * (D + 2);
    for (int64_t g = 0; g < a->group; g++) {
        const float *partials = call->partials + (head * a->group + g) * (D + 2);
        float *out = a->out + ((sequence * a->kv_heads + head) * a->group + g) * (a->shares ? D + 1 : D);
        float max = LEAST_SCORE, sum = 0.0f;
        for (int64_t p = begin; p < end; p++) max = fmaxf(max, partials[p * stride + D]);
        memset(out, 0, sizeof(float) * (size_t)D);
        for (int64_t p = begin; p < end; p++) {
            const float *partial = partials + p * stride;
            const float weight = exp2_scalar(partial[D] - max);
            sum += weight * partial[D + 1];
            for (int64_t i = 0; i < D; i += 8)
                _mm256_storeu_ps(out + i, _mm256_fmadd_ps(_mm256_set1_ps(weight), _mm256_loadu_ps(partial + i),
                                                          _mm256_loadu_ps(out + i)));
        }
        const float divisor = sum == 0.0f ? 1.0f : sum;
        for (int64_t i = 0; i < D; i += 8)
            _mm256_storeu_ps(out + i, _mm256_div_ps(_mm256_loadu_ps(out + i), _mm256_set1_ps(divisor)));
        if (a->shares) out[D] = sum == 0.0f ? -INFINITY : max + log2_scalar(sum);
    }
}

/* The packed pages that a sequence's query sees, and how they are cut into pieces. */
struct cut {
    int64_t position; /* of the query */
    int64_t visible;  /* the first position that it sees */
    int begin, end;   /* pages */
    int pages;        /* of a piece; the last one may be shorter */
    int pieces;
};

static struct cut cut_of(const struct decode_args *a, int64_t b) {
    const int64_t packed = a->num_blocks[b] * a->block_size;
    struct cut c = {.position = packed + a->tail_lens[b] - 1, .end = (int)(packed / a->page.tokens)};
    c.visible = first_visible(&a->rule, c.position);
    c.begin = (int)((c.visible < packed ? c.visible : packed) / a->page.tokens);
    const int least = (int)(PIECE_TILES * PAGE / a->page.tokens);
    const int share = (c.end - c.begin + MAX_PIECES - 1) / MAX_PIECES;
    c.pages = share > least ? share : least;
    c.pieces = (c.end - c.begin + c.pages - 1) / c.pages;
    return c;
}

/* Item: one piece of one KV head of one sequence. Piece 0 is the fp16 tokens. */
static void decode_item(void *context, int64_t item) {
    const struct decode_call *call = context;
    const struct decode_args *a = call->args;
    const int64_t piece = item / a->kv_heads, head = item % a->kv_heads;
    int64_t b = 0;
    while (call->first_piece[b + 1] <= piece) b++;
    const int D = (int)a->head_dim, row = row_of(D), group = (int)a->group;
    const int index = (int)(piece - call->first_piece[b]);
    const struct cut cut = cut_of(a, b);

    const int64_t packed = a->num_blocks[b] * a->block_size, sink_tokens = packed ? a->sink_tokens : 0;
    const int64_t hidden_sinks = cut.visible < sink_tokens ? cut.visible : sink_tokens;
    const int64_t hidden_tail = cut.visible > packed ? cut.visible - packed : 0;
    const uint16_t *sinks = a->sinks + a->slots[b] * a->sinks_slot_stride + head * a->sinks_head_stride;
    const uint16_t *tail = a->tails + a->slots[b] * a->tails_slot_stride + head * a->tails_head_stride;
    const struct half_run runs[2] = {
        {sinks + hidden_sinks * D, sinks + (a->sink_tokens + hidden_sinks) * D, (int)(sink_tokens - hidden_sinks)},
        {tail + hidden_tail * D, tail + a->tails_value_offset + hidden_tail * D, (int)(a->tail_lens[b] - hidden_tail)},
    };
    const int end = cut.begin + index * cut.pages;
    const struct pages pages = {
        .format = &a->page,
        .pool = a->pool + head * a->pool_head_stride,
        .table = a->block_tables + b * a->table_stride,
        .block_stride = a->pool_block_stride,
        .pages_per_block = (int)(a->block_size / a->page.tokens),
        .begin = end - cut.pages,
        .end = end < cut.end ? end : cut.end,
        .unseen = cut.visible > sink_tokens ? cut.visible : sink_tokens,
        .softcap = a->rule.softcap,
    };
    float *partials = call->partials + (piece * a->kv_heads + head) * group * (D + 2);
    const float *query = a->query + (b * a->kv_heads + head) * group * D;
    for (int g = 0; g < group; g += HEADS) {
        const int heads = group - g < HEADS ? group - g : HEADS;
        ALIGNED float scaled[HEADS * MAX_HEAD_DIM];
        for (int i = 0; i < heads * D; i++) scaled[i] = query[g * D + i] * (a->rule.scale * LOG2E);
        if (index == 0)
            attend_half_of[row][heads - 1](runs, a->rule.softcap, scaled, partials + g * (D + 2));
        else
            attend_pages_of[kind_of(&a->page)][a->terms - 1][row][heads - 1](&pages, scaled, partials + g * (D + 2));
    }
    if (atomic_fetch_sub_explicit(&call->unfinished[b * a->kv_heads + head], 1, memory_order_acq_rel) == 1)
        merge_pieces(call, b, head);
}

static int check(const struct decode_args *a) {
    if (!supported_head_dim(a->head_dim)) return STATUS_HEAD_DIM;
    if (a->terms != 1 && a->terms != 2) return STATUS_TERMS;
    if (a->block_size + a->sink_tokens > MAX_HALF_TOKENS || a->sink_tokens >= PAGE) return STATUS_LENGTH;
    for (int64_t b = 0; b < a->batch; b++) {
        if (a->slots[b] < 0 || a->slots[b] >= a->num_slots) return STATUS_SLOT;
        if (a->tail_lens[b] < !a->shares || a->tail_lens[b] > a->block_size) return STATUS_LENGTH;
        if (a->num_blocks[b] < 0 || a->num_blocks[b] > a->table_stride) return STATUS_LENGTH;
        const int32_t *table = a->block_tables + b * a->table_stride;
        for (int64_t i = cut_of(a, b).visible / a->block_size; i < a->num_blocks[b]; i++)
            if (table[i] < 0 || table[i] >= a->pool_blocks) return STATUS_BLOCK_ID;
    }
    return STATUS_OK;
}

EXPORT const int kvferry_decode_args_size = sizeof(struct decode_args); /* native.py compares */

EXPORT int kvferry_decode(const struct decode_args *a) {
    const int status = check(a);
    if (status || !a->batch) return status;
    struct decode_call call = {.args = a};
    call.first_piece = malloc(sizeof *call.first_piece * (size_t)(a->batch + 1));
    call.unfinished = malloc(sizeof *call.unfinished * (size_t)(a->batch * a->kv_heads));
    if (!call.first_piece || !call.unfinished) {
        free(call.first_piece);
        free((void *)call.unfinished);
        return STATUS_MEMORY;
    }
    call.first_piece[0] = 0;
    int64_t tiles = 0;
    for (int64_t b = 0; b < a->batch; b++) {
        const struct cut cut = cut_of(a, b);
        const int64_t pieces = 1 + cut.pieces;
        tiles += (cut.end - cut.begin) * (a->page.tokens / PAGE);
        call.first_piece[b + 1] = call.first_piece[b] + pieces;
        for (int64_t h = 0; h < a->kv_heads; h++) atomic_init(&call.unfinished[b * a->kv_heads + h], (int)pieces);
    }
    const int64_t items = call.first_piece[a->batch] * a->kv_heads;
    call.partials = malloc(sizeof(float) * (size_t)(items * a->group * (a->head_dim + 2)));
    const int64_t work = (tiles + a->batch) * a->kv_heads * a->group;
    if (call.partials) run_items(decode_item, &call, items, work > SERIAL_WORK ? (int)a->threads : 1);
    const int result = call.partials ? STATUS_OK : STATUS_MEMORY;
    free(call.partials);
    free((void *)call.unfinished);
    free(call.first_piece);
    return result;
}

/* Shares [R, rows, D + 1] as `kvferry_decode` gives them. */
struct merge_args {
    const float *shares;
    float *out; /* [rows, D] */
    int64_t num_shares, rows, head_dim;
};

EXPORT const int kvferry_merge_args_size = sizeof(struct merge_args);

/* In the order of shares; a weight of 0 is skipped, so that an empty share changes no bit. */
EXPORT int kvferry_merge(const struct merge_args *a) {
    if (!supported_head_dim(a->head_dim)) return STATUS_HEAD_DIM;
    const int64_t D = a->head_dim, stride = a->rows * (D + 1);
    for (int64_t row = 0; row < a->rows; row++) {
        const float *shares = a->shares + row * (D + 1);
        float *out = a->out + row * D;
        float max = LEAST_SCORE, sum = 0.0f;
        for (int64_t r = 0; r < a->num_shares; r++) max = fmaxf(max, shares[r * stride + D]);
        memset(out, 0, sizeof(float) * (size_t)D);
        for (int64_t r = 0; r < a->num_shares; r++) {
            const float *share = shares + r * stride;
            const float weight = exp2_scalar(share[D] - max);
            if (weight == 0.0f) continue;
            sum += weight;
            for (int64_t i = 0; i < D; i += 8)
                _mm256_storeu_ps(out + i, _mm256_fmadd_ps(_mm256_set1_ps(weight), _mm256_loadu_ps(share + i),
                                                          _mm256_loadu_ps(out + i)));
        }
        const float divisor = sum == 0.0f ? 1.0f : sum;
        for (int64_t i = 0; i < D; i += 8)
            _mm256_storeu_ps(out + i, _mm256_div_ps(_mm256_loadu_ps(out + i), _mm256_set1_ps(divisor)));
    }
    return STATUS_OK;
}
