"""Quantize and pack one layer of one block on a GPU. Twin: `reference.quantize_pages`.

A page has as many groups as channels, D, whichever way they run: keys one a channel (32 tokens), values D/32 a token
(32 channels). So both sides are one [D, 32] tile, a group a row, and differ in their strides and in how codes are put
into words.
"""

# Triton is untyped, and the annotations of a kernel are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvferry.kernels import reference, scales
from kvferry.kernels.spec import PAGE

SIDE = tl.constexpr(PAGE)
"""Tokens a page and values a group."""
FIT_SHRINK = tl.constexpr(reference.FIT_SHRINK[2])
FIT_STEPS = tl.constexpr(reference.FIT_STEPS)
MIN_FOLDED_SCALE = tl.constexpr(scales.MIN_FOLDED_SCALE)
MAX_FOLDED = tl.constexpr(scales.MAX_FOLDED)
LIMIT = tl.constexpr(reference.LIMIT)
FOLD = tl.constexpr(scales.FOLD)
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds a small fp32 number to the nearest integer, ties to even."""
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
"""No fused multiply-add: the reference has none."""


@triton.jit
def nearest_codes(x, scale, zero):
    inverse = 1.0 / tl.maximum(scale, MIN_FOLDED_SCALE / FOLD)
    y = (x - zero[:, None]) * inverse[:, None]
    return (tl.minimum(tl.maximum(y, 0.0), 3.0) + ROUNDER) - ROUNDER


@triton.jit
def fit_groups(x, valid):
    """Codes (fp32 [D, 32]), folded scale and zero point (fp16 [D]) of groups in rows. Twin: `reference.fit_groups`."""
    x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    valid_f = valid.to(tl.float32)
    members = tl.sum(valid_f, axis=1)
    count = tl.maximum(members, 1.0)
    lo = tl.min(tl.where(valid, x, float("inf")), axis=1)
    hi = tl.max(tl.where(valid, x, -float("inf")), axis=1)
    lo = tl.where(members > 0, lo, 0.0)
    hi = tl.where(members > 0, hi, 0.0)
    scale = (hi - lo) * (FIT_SHRINK / 3.0)
    zero = (lo + hi) * 0.5 - 1.5 * scale
    mean_x = tl.sum(x * valid_f, axis=1) / count
    dx = x - mean_x[:, None]
    for _ in tl.static_range(FIT_STEPS):
        codes = nearest_codes(x, scale, zero) * valid_f
        mean_c = tl.sum(codes, axis=1) / count
        dc = (codes - mean_c[:, None]) * valid_f
        var = tl.sum(dc * dc, axis=1)
        cov = tl.sum(dc * dx, axis=1)
        scale = tl.where(var > 0, cov / tl.maximum(var, 1e-6), scale)
        zero = mean_x - scale * mean_c
    folded_scale = tl.minimum(tl.maximum(scale * FOLD, MIN_FOLDED_SCALE), MAX_FOLDED)
    folded_scale = folded_scale.to(tl.float16)
    s = folded_scale.to(tl.float32)
    folded_zero = tl.minimum(tl.maximum(zero - s, -MAX_FOLDED), MAX_FOLDED).to(tl.float16)
    codes = nearest_codes(x, s / FOLD, folded_zero.to(tl.float32) + s) * valid_f
    empty = members == 0
    return codes, tl.where(empty, 0.0, folded_scale), tl.where(empty, -0.0, folded_zero)


@triton.jit
def flag_not_finite(flag_ptr, x):
    """fp16 as fp32: the largest number is 65504."""
    if tl.sum(tl.where(tl.abs(x) <= MAX_FOLDED, 0, 1)) > 0:
        tl.store(flag_ptr, 1)


@triton.jit
def quantize_keys(
    page_ptr,  # fp16 [32, D], the page's first token
    token_stride,
    first_token,
    sink_tokens,
    words_ptr,
    halves_ptr,
    flag_ptr,
    HEAD_DIM: tl.constexpr,
):
    """Row of the tile: channel; column: token. Channel f * D/4 + 2 j + h is in bits 2 f + 8 h of word j."""
    channel = tl.arange(0, HEAD_DIM)
    token = tl.arange(0, SIDE)
    word = tl.arange(0, HEAD_DIM // 8)
    x = tl.load(page_ptr + token[None, :] * token_stride + channel[:, None]).to(tl.float32)
    flag_not_finite(flag_ptr, x)
    valid = (first_token + token >= sink_tokens)[None, :] & (channel >= 0)[:, None]
    codes, scale, zero = fit_groups(x, valid)
    tl.store(halves_ptr + 4 * HEAD_DIM + channel, scale)
    tl.store(halves_ptr + 5 * HEAD_DIM + channel, zero)
    shift = channel // (HEAD_DIM // 4) * 2 + channel % 2 * 8
    fields = codes.to(tl.int32) << shift[:, None]
    halves = tl.sum(tl.reshape(fields, [4, HEAD_DIM // 4, SIDE]), axis=0)
    words = tl.sum(tl.reshape(halves, [HEAD_DIM // 8, 2, SIDE]), axis=1)
    tl.store(words_ptr + word[:, None] * SIDE + token[None, :], words.to(tl.int16))


@triton.jit
def quantize_values(
    page_ptr,  # fp16 [32, D], the page's first token
    token_stride,
    first_token,
    sink_tokens,
    bytes_ptr,
    halves_ptr,
    flag_ptr,
    HEAD_DIM: tl.constexpr,
):
    """Row of the tile: group g of token t, at t * D/32 + g; column: channel of the group. Channel f * D/4 + b is in
    bits 2 f of byte b."""
    GROUPS: tl.constexpr = HEAD_DIM // SIDE
    row = tl.arange(0, HEAD_DIM)
    token = row // GROUPS
    channel = (row % GROUPS * SIDE)[:, None] + tl.arange(0, SIDE)[None, :]
    x = tl.load(page_ptr + token[:, None] * token_stride + channel).to(tl.float32)
    flag_not_finite(flag_ptr, x)
    valid = (first_token + token >= sink_tokens)[:, None] & (channel >= 0)
    codes, scale, zero = fit_groups(x, valid)
    stored = row % GROUPS * SIDE + token  # [group][token]
    tl.store(halves_ptr + 10 * HEAD_DIM + stored, scale)
    tl.store(halves_ptr + 11 * HEAD_DIM + stored, zero)
    fields = codes.to(tl.int32) << (channel // (HEAD_DIM // 4) * 2)
    packed = tl.sum(tl.reshape(fields, [SIDE, 4, HEAD_DIM // 4]), axis=1)
    place = tl.arange(0, SIDE)[:, None] * (HEAD_DIM // 4) + tl.arange(0, HEAD_DIM // 4)[None, :]
    tl.store(bytes_ptr + 12 * HEAD_DIM + place, packed.to(tl.uint8))


@triton.jit(do_not_specialize=["sink_tokens"])
def quantize_fwd_kernel(
    key_ptr,  # fp16 [H, T, D]
    value_ptr,  # fp16 [H, T, D]
    bytes_ptr,  # uint8 [H, T/32, 24 D]
    words_ptr,  # int16 view of the same
    halves_ptr,  # fp16 view of the same
    flag_ptr,  # int32 [1]: set to 1 when K or V is not finite, otherwise left alone
    key_head_stride,
    key_token_stride,
    value_head_stride,
    value_token_stride,
    sink_tokens,
    PAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """One page of one KV head: keys in programs (.., .., 0), values in programs (.., .., 1)."""
    page = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    first = page * SIDE
    base = (head * PAGES + page) * (12 * HEAD_DIM)  # in 16-bit units
    if tl.program_id(2) == 0:
        quantize_keys(
            key_ptr + head * key_head_stride + first * key_token_stride, key_token_stride,
            first, sink_tokens, words_ptr + base, halves_ptr + base, flag_ptr, HEAD_DIM,
        )  # fmt: skip
    else:
        quantize_values(
            value_ptr + head * value_head_stride + first * value_token_stride, value_token_stride,
            first, sink_tokens, bytes_ptr + 2 * base, halves_ptr + base, flag_ptr, HEAD_DIM,
        )  # fmt: skip


def quantize_block(keys: Tensor, values: Tensor, *, sink_tokens: int, out: Tensor, flag: Tensor) -> None:
    """Quantizes keys, values fp16 [H, T, D] (channels contiguous) into out uint8 [H, T/32, 24 D], contiguous.

    Never synchronizes. `flag`, int32 [1], becomes 1 when a value is not finite: `out` must not be used then. Several
    calls may share a flag; the caller reads it before it publishes any of them.
    """
    heads, tokens, head_dim = keys.shape
    pages = tokens // SIDE.value
    quantize_fwd_kernel[(pages, heads, 2)](
        keys,
        values,
        out,
        out.view(torch.int16),
        out.view(torch.float16),
        flag,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        sink_tokens,
        PAGES=pages,
        HEAD_DIM=head_dim,
        **OPTIONS,
    )
