/* The page of kernels/page.py. Python says where its parts lie, so that page.py stays the one place that knows; scales
 * and zero points are those of kernels/scales.py. */
#pragma once

#include <stdint.h>

#define PAGE 32 /* tokens a tile, and a smallest page */
#define MAX_PAGE_TOKENS 128
#define MIN_GROUP 16
#define MAX_HEAD_DIM 256
#define MAX_VALUE_GROUPS (MAX_HEAD_DIM / MIN_GROUP)
#define MAX_PLANES 4
#define FOLD 4.0f
#define NO_CHANNEL 255 /* fills up the list of boosted channels */

/* K or V of a page. Offsets are in bytes from the page's start. */
struct tensor_format {
    int64_t codes, scale, zero;
    int64_t bits;        /* 2, 4 or 8: so many bits of code, in planes of two; 16: fp16 in place of codes */
    int64_t group;       /* tokens of a channel (K), channels of a token (V) */
    int64_t byte_scales; /* scales and zero points of one byte, else fp16 */
    float unit_offset, zero_step;
    int64_t boosted;         /* channels of K with two more bits */
    int64_t boost, channels; /* where their highest plane lies, and which they are */
    float boosted_unit_offset, boosted_zero_step;
};

struct page_format {
    struct tensor_format key, value;
    int64_t tokens, bytes;
};

static inline int planes_of(const struct tensor_format *f) { return (int)(f->bits / 2); }

/* Bytes of one plane of a tile, K or V: 32 tokens of D / 4 bytes. */
#define PLANE_BYTES(D) (8 * (D))

static inline int value_groups(const struct page_format *f, int head_dim) {
    return (head_dim + (int)f->value.group - 1) / (int)f->value.group;
}

static inline int supported_head_dim(int64_t head_dim) {
    return head_dim == 32 || head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}
