"""The specification: quantize, pack, dequantize and attend, in plain PyTorch.

Every other implementation is tested against this file. It is written to be read, not to be fast, and computes in
fp32 inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvferry.kernels.layout import FOLD, GROUP, PAGE, join_page, split_page
from kvferry.kernels.packed import DecodeBatch, PackedPrefix

FIT_SHRINK = 0.8
"""First guess of the scale, as a share of (max - min) / 3. Shrinking first and then fitting twice leaves 0.0936 of a
unit normal's variance at 32 values a group; min/max alone leaves 0.154, the converged fit 0.0915."""
FIT_STEPS = 2
MIN_FOLDED_SCALE = 2.0**-14
"""Smallest normal fp16: a constant group keeps a scale that is not zero and not subnormal."""
MAX_FOLDED = 65504.0
LIMIT = 16384.0
"""K and V are clamped to this magnitude before the fit, so that S and Z cannot overflow fp16."""


def fit_groups(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, folded scale and folded zero point of groups of values.

    x: fp32 [..., n], one group a row; valid: bool, broadcastable to x: values that count.
    Returns codes uint8 [..., n] (0 where not valid), S and Z fp16 [...]; both 0 for a group with no valid value.

    Least squares in the style of Lloyd's iteration: given the codes, the best (scale, zero point) is a linear
    regression of x on the codes; given those, the best codes are the nearest ones.
    """
    valid = valid.expand_as(x)
    x = x.clamp(-LIMIT, LIMIT)
    count = valid.sum(-1, keepdim=True).clamp_min(1).float()
    lo = x.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    hi = x.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    lo, hi = (
        lo.where(lo.isfinite(), torch.zeros_like(lo)),
        hi.where(hi.isfinite(), torch.zeros_like(hi)),
    )
    scale = (hi - lo) * (FIT_SHRINK / 3.0)
    zero = (lo + hi) * 0.5 - 1.5 * scale
    mean_x = (x * valid).sum(-1, keepdim=True) / count
    for _ in range(FIT_STEPS):
        codes = _nearest_codes(x, scale, zero) * valid
        mean_c = codes.sum(-1, keepdim=True) / count
        dc = (codes - mean_c) * valid
        var = (dc * dc).sum(-1, keepdim=True)
        cov = (dc * (x - mean_x)).sum(-1, keepdim=True)
        fitted = cov / var.clamp_min(1e-6)
        scale = torch.where(var > 0, fitted, scale)
        zero = mean_x - scale * mean_c
    folded_scale = (scale * FOLD).clamp(MIN_FOLDED_SCALE, MAX_FOLDED).half()
    folded_zero = (zero - folded_scale.float()).clamp(-MAX_FOLDED, MAX_FOLDED).half()
    codes = _nearest_codes(x, *unfold(folded_scale, folded_zero))
    any_valid = valid.any(-1, keepdim=True)
    codes = (codes * valid).to(torch.uint8)
    nothing = torch.zeros_like(folded_scale)  # not a product with 0: that would leave -0.0 behind
    folded_scale = torch.where(any_valid, folded_scale, nothing)
    folded_zero = torch.where(any_valid, folded_zero, nothing)
    return codes, folded_scale.squeeze(-1), folded_zero.squeeze(-1)


def unfold(folded_scale: Tensor, folded_zero: Tensor) -> tuple[Tensor, Tensor]:
    """Folded (S, Z) fp16 -> (scale, zero point) fp32: a code c stands for c * scale + zero_point."""
    s = folded_scale.float()
    return s / FOLD, folded_zero.float() + s


def _nearest_codes(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    inverse = 1.0 / scale.clamp_min(MIN_FOLDED_SCALE / FOLD)
    return ((x - zero) * inverse).round().clamp(0, 3)


def quantize_pages(keys: Tensor, values: Tensor, *, sink_tokens: int = 0) -> Tensor:
    """keys, values [..., T, D], T a multiple of 32 -> page blobs uint8 [..., T/32, page_bytes].

    The first `sink_tokens` tokens are left out. Raises ValueError when a value is not finite.
    """
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise ValueError("K or V is not finite: the block is refused")
    *lead, length, dim = keys.shape
    k = keys.float().reshape(*lead, length // PAGE, PAGE, dim)
    v = values.float().reshape(*lead, length // PAGE, PAGE, dim // GROUP, GROUP)
    tokens = torch.arange(keys.shape[-2], device=keys.device).view(-1, PAGE)
    valid = tokens >= sink_tokens
    k_codes, k_scale, k_zero = fit_groups(k.transpose(-1, -2), valid[:, None, :])
    v_codes, v_scale, v_zero = fit_groups(v, valid[:, :, None, None])
    return join_page(k_codes.transpose(-1, -2), k_scale, k_zero, v_codes.flatten(-2), v_scale, v_zero)


def dequantize_pages(pages: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Page blobs [..., P, page_bytes] -> keys, values fp32 [..., P * 32, D]."""
    k_codes, k_scale, k_zero, v_codes, v_scale, v_zero = split_page(pages, head_dim)
    ks, kz = unfold(k_scale, k_zero)
    vs, vz = unfold(v_scale, v_zero)
    keys = k_codes.float() * ks.unsqueeze(-2) + kz.unsqueeze(-2)
    v = v_codes.float().reshape(*v_codes.shape[:-1], head_dim // GROUP, GROUP)
    values = v * vs.unsqueeze(-1) + vz.unsqueeze(-1)
    return keys.flatten(-3, -2), values.flatten(-2).flatten(-3, -2)


def attend(query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention over one part of a context.

    query fp32 [H, G, n, D] (G query heads share a KV head), keys, values fp32 [H, T, D],
    allowed bool broadcastable to [n, T]. Returns out [H, G, n, D] and log-sum-exp [H, G, n] (-inf: nothing allowed).
    """
    scores = torch.einsum("hgnd,htd->hgnt", query, keys) * scale
    scores = scores.masked_fill(~allowed, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0)
    return torch.einsum("hgnt,htd->hgnd", probs, values), lse


def merge(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Merges (out, log-sum-exp) of disjoint parts of one context."""
    lse = torch.stack([part[1] for part in parts])
    weights = torch.exp(lse - torch.logsumexp(lse, dim=0))
    return (torch.stack([part[0] for part in parts]) * weights.unsqueeze(-1)).sum(0)


def _packed_parts(query: Tensor, pages: Tensor, sinks: Tensor, scale: float) -> list[tuple[Tensor, Tensor]]:
    """Attention over the sinks and the packed pages [H, P, page_bytes] of a context that begins at position 0."""
    keys, values = dequantize_pages(pages, query.shape[-1])
    sink_tokens = sinks.shape[-2]
    past_sinks = torch.arange(keys.shape[-2], device=query.device) >= sink_tokens
    parts = [attend(query, keys, values, past_sinks, scale)]
    if sink_tokens:
        every = torch.ones(sink_tokens, dtype=torch.bool, device=query.device)
        parts.append(attend(query, sinks[:, 0].float(), sinks[:, 1].float(), every, scale))
    return parts


class ReferenceKernels:
    """`PackedKernels` in plain PyTorch: the specification, and the slow path where nothing else runs."""

    name = "reference"

    def quantize_block(self, keys: Tensor, values: Tensor, *, sink_tokens: int, out: Tensor) -> None:
        out.copy_(quantize_pages(keys, values, sink_tokens=sink_tokens))

    def decode_attention(self, query: Tensor, batch: DecodeBatch, *, layer: int, scale: float) -> Tensor:
        rows = []
        for b in range(query.shape[0]):
            slot, n = int(batch.slots[b]), int(batch.num_blocks[b])
            tail = batch.tails[slot, layer, :, :, : int(batch.tail_lens[b])].float()
            kv_heads = tail.shape[1]
            q = query[b].float().view(kv_heads, -1, 1, query.shape[-1])  # [H, G, 1, D]
            every = torch.ones(tail.shape[2], dtype=torch.bool, device=query.device)
            parts = [attend(q, tail[0], tail[1], every, scale)]
            if n:
                blocks = batch.pool[batch.block_tables[b, :n].long(), layer]  # [n, H, P, bytes]
                pages = blocks.transpose(0, 1).flatten(1, 2)
                parts += _packed_parts(q, pages, batch.sinks[slot, layer], scale)
            rows.append(merge(parts).reshape(query.shape[1:]))
        return torch.stack(rows).to(query.dtype)

    def chunk_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        prefix: PackedPrefix,
        *,
        layer: int,
        scale: float,
    ) -> Tensor:
        n = query.shape[1]
        q = query.float().reshape(keys.shape[0], -1, n, query.shape[-1])  # [H, G, n, D]
        causal = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()
        parts = [attend(q, keys.float(), values.float(), causal, scale)]
        if prefix.table.numel():
            blocks = prefix.pool[prefix.table.long(), layer]
            pages = blocks.transpose(0, 1).flatten(1, 2)
            parts += _packed_parts(q, pages, prefix.sinks[layer], scale)
        return merge(parts).flatten(0, 1).to(query.dtype)
