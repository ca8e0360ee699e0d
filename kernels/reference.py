"""The specification: quantize, pack, dequantize and attend, in plain PyTorch.

Every other implementation is tested against this file. It is written to be read, not to be fast, and computes in
fp32 inside.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvferry.kernels.packed import DecodeBatch, PackedPrefix
from kvferry.kernels.page import Packed, PageFormat
from kvferry.kernels.scales import FOLD, MIN_FOLDED_SCALE, round_scale, round_zero, unfold, widen
from kvferry.kernels.spec import TensorSpec

FIT_SHRINK = {2: 0.8, 4: 1.0, 6: 1.0, 8: 1.0}
"""First guess of the scale, as a share of (max - min) / (2^bits - 1). At 2 bits, shrinking first and then fitting twice
leaves 0.0933 of a unit normal's variance at 32 values a group; min/max alone leaves 0.154, the converged fit 0.0915."""
FIT_STEPS = 2
LOG2E = math.log2(math.e)
LOWEST = -1e30
"""Below every score, and finite: a difference of two is not NaN."""
LIMIT = 16384.0
"""K and V are clamped to this magnitude before the fit, so that S and Z cannot overflow fp16."""


class Groups(NamedTuple):
    """Codes uint8 [..., n], and scale and zero point [...] as stored."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def fit_groups(x: Tensor, valid: Tensor, bits: int, scales: str) -> Groups:
    """Codes, scale and zero point of groups of values, as stored.

    x: fp32 [..., n], one group a row; valid: bool, broadcastable to x: values that count.
    Codes are 0 where not valid; all is 0 for a group with no valid value.

    Least squares in the style of Lloyd's iteration: given the codes, the best (scale, zero point) is a linear
    regression of x on the codes; given those, the best codes are the nearest ones. Sums run over a group in order and
    nothing is fused, so that another implementation can have the same bits.
    """
    top = (1 << bits) - 1
    valid = valid.expand_as(x)
    weight = valid.float()
    x = x.clamp(-LIMIT, LIMIT)
    count = _ordered_sum(weight).clamp_min(1)
    empty = ~valid.any(-1)
    lo = x.masked_fill(~valid, torch.inf).amin(-1).masked_fill(empty, 0.0)
    hi = x.masked_fill(~valid, -torch.inf).amax(-1).masked_fill(empty, 0.0)
    scale = (hi - lo) * torch.tensor(FIT_SHRINK[bits] / top, dtype=torch.float32)
    zero = (lo + hi) * 0.5 - (top / 2) * scale
    mean_x = _ordered_sum(x * weight) / count
    deviation = x - mean_x.unsqueeze(-1)
    for _ in range(FIT_STEPS):
        codes = _nearest_codes(x, scale, zero, top) * weight
        sum_c = _ordered_sum(codes)
        mean_c = sum_c / count
        spread = count * _ordered_sum(codes * codes) - sum_c * sum_c  # count * sum of squared deviations of the codes
        covariance = _ordered_sum(codes * deviation) - mean_c * _ordered_sum(deviation * weight)
        scale = torch.where(spread > 0, covariance * count / spread, scale)
        zero = mean_x - scale * mean_c
    stored_scale = round_scale(scale, zero, bits, scales)
    scale = widen(stored_scale) / FOLD
    stored_zero = round_zero(mean_x - scale * mean_c, stored_scale, bits)
    codes = _nearest_codes(x, *unfold(stored_scale, stored_zero, bits), top) * weight
    return Groups(codes.to(torch.uint8), stored_scale.masked_fill(empty, 0), stored_zero.masked_fill(empty, 0))


def _ordered_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, first value first."""
    total = x[..., 0].clone()
    for i in range(1, x.shape[-1]):
        total += x[..., i]
    return total


def _nearest_codes(x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    inverse = 1.0 / scale.clamp_min(MIN_FOLDED_SCALE / FOLD)
    return ((x - zero.unsqueeze(-1)) * inverse.unsqueeze(-1)).round().clamp(0, top)


def quantize_pages(keys: Tensor, values: Tensor, page: PageFormat, *, sink_tokens: int = 0) -> Tensor:
    """keys, values [..., T, D], T a multiple of the page -> page blobs uint8 [..., T / page.tokens, page_bytes].

    The first `sink_tokens` tokens are left out. Raises ValueError when a value is not finite.
    """
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise ValueError("K or V is not finite: the block is refused")
    k = torch.unflatten(keys, -2, (-1, page.tokens))
    v = torch.unflatten(values, -2, (-1, page.tokens))
    valid = torch.arange(keys.shape[-2], device=keys.device).view(-1, page.tokens) >= sink_tokens  # [page, token]
    key, value = page.spec.key, page.spec.value
    return page.join(
        _drop_sinks(k, valid) if key.bits == 16 else _quantize_keys(k.float(), valid, page),
        _drop_sinks(v, valid) if value.bits == 16 else _quantize_values(v.float(), valid, value),
    )


def _drop_sinks(x: Tensor, valid: Tensor) -> Tensor:
    return x.half().masked_fill(~valid.unsqueeze(-1), 0.0)


def _quantize_keys(keys: Tensor, valid: Tensor, page: PageFormat) -> Packed:
    """keys fp32 [..., page, token, D], valid [page, token]."""
    tensor = page.spec.key
    groups = torch.unflatten(keys, -2, (-1, tensor.group_size)).transpose(-1, -2)  # [..., page, group, D, token]
    used = torch.unflatten(valid, -1, (-1, 1, tensor.group_size))
    codes, scale, zero = fit_groups(groups, used, tensor.bits, tensor.scales)
    channels = None
    if page.boosted:
        channels = widest_channels(keys, valid, page.boosted)
        boosted = torch.zeros(*channels.shape[:-1], 1, page.head_dim, dtype=torch.bool)
        boosted.scatter_(-1, channels.long().unsqueeze(-2), True)
        wider = fit_groups(groups, used, tensor.bits + 2, tensor.scales)
        codes = torch.where(boosted.unsqueeze(-1), wider.codes, codes)
        scale, zero = torch.where(boosted, wider.scale, scale), torch.where(boosted, wider.zero, zero)
    return Packed(codes.transpose(-1, -2).flatten(-3, -2), scale, zero, channels)


def widest_channels(keys: Tensor, valid: Tensor, count: int) -> Tensor:
    """The `count` channels of the widest range in each page, ascending; of equal ones the first. uint8 [..., count].

    keys fp32 [..., page, token, D], clamped as in the fit; valid [page, token]. No token may be valid: any will do.
    """
    x = keys.clamp(-LIMIT, LIMIT)
    unused = ~valid.unsqueeze(-1)
    spread = x.masked_fill(unused, -torch.inf).amax(-2) - x.masked_fill(unused, torch.inf).amin(-2)
    order = spread.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values.to(torch.uint8)


def _quantize_values(values: Tensor, valid: Tensor, tensor: TensorSpec) -> Packed:
    """values fp32 [..., page, token, D], valid [page, token]. The last group of a token may be shorter."""
    groups = torch.split(values, tensor.group_size, dim=-1)
    parts = [fit_groups(group, valid.unsqueeze(-1), tensor.bits, tensor.scales) for group in groups]
    codes = torch.cat([part.codes for part in parts], dim=-1)
    scale, zero = (torch.stack([part[i] for part in parts], dim=-1) for i in (1, 2))
    return Packed(codes, scale, zero)


def dequantize_pages(pages: Tensor, page: PageFormat) -> tuple[Tensor, Tensor]:
    """Page blobs [..., P, page_bytes] -> keys, values fp32 [..., P * page.tokens, D]."""
    key, value = page.spec.key, page.spec.value
    keys, values = page.split(pages)
    if not isinstance(keys, Tensor):
        scale, zero = _unfold_keys(keys, key)
        scale, zero = (x.repeat_interleave(key.group_size, dim=-2) for x in (scale, zero))
        keys = keys.codes.float() * scale + zero
    if not isinstance(values, Tensor):
        scale, zero = unfold(values.scale, values.zero, value.bits)
        scale, zero = (x.repeat_interleave(value.group_size, dim=-1)[..., : page.head_dim] for x in (scale, zero))
        values = values.codes.float() * scale + zero
    return keys.float().flatten(-3, -2), values.float().flatten(-3, -2)


def _unfold_keys(keys: Packed, tensor: TensorSpec) -> tuple[Tensor, Tensor]:
    """fp32 scale and zero point [..., K group, D]."""
    scale, zero = unfold(keys.scale, keys.zero, tensor.bits)
    if keys.channels is None:
        return scale, zero
    index = keys.channels.long().unsqueeze(-2).expand(*keys.scale.shape[:-1], -1)
    wider = unfold(keys.scale.gather(-1, index), keys.zero.gather(-1, index), tensor.bits + 2)
    return scale.scatter(-1, index, wider[0]), zero.scatter(-1, index, wider[1])


class ScoreRule(NamedTuple):
    """What a score is made of, and which tokens a query sees: `PackedKernels.decode_attention`."""

    scale: float
    window: int | None = None
    softcap: float | None = None

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """bool [n, T] for positions [n] and [T] in the sequence."""
        distance = query_positions[:, None] - key_positions
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)


class Part(NamedTuple):
    """Attention over a part of a context."""

    out: Tensor
    """fp32 [H, G, n, D]"""
    lse: Tensor
    """log-sum-exp [H, G, n]; -inf where a query sees nothing of the part."""


def attend(query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, rule: ScoreRule) -> Part:
    """Softmax attention over one part of a context.

    query fp32 [H, G, n, D] (G query heads share a KV head), keys, values fp32 [H, T, D],
    allowed bool broadcastable to [n, T].
    """
    scores = torch.einsum("hgnd,htd->hgnt", query, keys) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~allowed, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0)
    return Part(torch.einsum("hgnt,htd->hgnd", probs, values), lse)


def merge(parts: list[Part]) -> Tensor:
    """Merges disjoint parts of one context: [H, G, n, D], 0 where a query sees nothing of any."""
    lse = torch.stack([part.lse for part in parts])
    weights = torch.exp(lse - torch.logsumexp(lse, dim=0).clamp_min(LOWEST))
    return (torch.stack([part.out for part in parts]) * weights.unsqueeze(-1)).sum(0)


def _packed_parts(
    query: Tensor, positions: Tensor, blocks: Tensor, page: PageFormat, sinks: Tensor, rule: ScoreRule
) -> list[Part]:
    """Attention over the sinks and the packed blocks [n, H, P, page_bytes] of a context that begins at position 0."""
    keys, values = dequantize_pages(blocks.transpose(0, 1).flatten(1, 2), page)
    sink_tokens = sinks.shape[-2]
    visible = rule.visible(positions, torch.arange(keys.shape[-2], device=query.device))
    packed = visible.clone()
    packed[:, :sink_tokens] = False
    parts = [attend(query, keys, values, packed, rule)]
    if sink_tokens:
        parts.append(attend(query, sinks[:, 0].float(), sinks[:, 1].float(), visible[:, :sink_tokens], rule))
    return parts


def _decode_parts(query: Tensor, batch: DecodeBatch, b: int, layer: int, rule: ScoreRule) -> list[Part]:
    """Attention of row b's query [Hq, D], n = 1, over its tail, its packed blocks and its sinks."""
    slot, n, tail_len = int(batch.slots[b]), int(batch.num_blocks[b]), int(batch.tail_lens[b])
    tail = batch.tails[slot, layer, :, :, :tail_len].float()
    q = query.float().view(tail.shape[1], -1, 1, query.shape[-1])  # [H, G, 1, D]
    first = n * batch.tails.shape[-2]
    tail_positions = first + torch.arange(tail_len, device=query.device)
    position = torch.tensor([first + tail_len - 1], device=query.device)
    parts = [attend(q, tail[0], tail[1], rule.visible(position, tail_positions), rule)]
    if n:
        blocks = batch.layout.layer_pages(batch.pool[batch.block_tables[b, :n].long()], layer)
        page = batch.layout.layers[layer].page
        parts += _packed_parts(q, position, blocks, page, batch.sinks[slot, layer], rule)
    return parts


class ReferenceKernels:
    """`PackedKernels` in plain PyTorch: the specification, and the slow path where nothing else runs."""

    name = "reference"

    def quantize_block(self, keys: Tensor, values: Tensor, page: PageFormat, *, sink_tokens: int, out: Tensor) -> None:
        out.copy_(quantize_pages(keys, values, page, sink_tokens=sink_tokens))

    def decode_attention(
        self,
        query: Tensor,
        batch: DecodeBatch,
        *,
        layer: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        rule = ScoreRule(scale, window, softcap)
        rows = [merge(_decode_parts(query[b], batch, b, layer, rule)) for b in range(query.shape[0])]
        return torch.stack([row.reshape(query.shape[1:]) for row in rows]).to(query.dtype)

    def share_attention(
        self, query: Tensor, share: DecodeBatch, *, layer: int, scale: float, softcap: float | None = None
    ) -> Tensor:
        rule = ScoreRule(scale, None, softcap)
        rows = []
        for b in range(query.shape[0]):
            parts = _decode_parts(query[b], share, b, layer, rule)
            lse = torch.logsumexp(torch.stack([part.lse for part in parts]), dim=0)
            row = torch.cat([merge(parts), lse.unsqueeze(-1) * LOG2E], dim=-1)
            rows.append(row.reshape(query.shape[1], -1))
        return torch.stack(rows)

    def merge_shares(self, shares: Tensor) -> Tensor:
        outs, lse = shares[..., :-1], shares[..., -1]
        peak = lse.amax(0).clamp_min(LOWEST)
        weights = torch.exp2(lse - peak)
        merged, total = torch.zeros_like(outs[0]), torch.zeros_like(peak)
        for out, weight in zip(outs, weights, strict=True):
            merged = merged + out * weight.unsqueeze(-1)
            total = total + weight
        return merged / torch.where(total == 0, 1.0, total).unsqueeze(-1)

    def chunk_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        prefix: PackedPrefix,
        *,
        layer: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        rule = ScoreRule(scale, window, softcap)
        n = query.shape[1]
        q = query.float().reshape(keys.shape[0], -1, n, query.shape[-1])  # [H, G, n, D]
        own = torch.arange(n, device=query.device)
        parts = [attend(q, keys.float(), values.float(), rule.visible(own, own), rule)]
        if prefix.table.numel():
            blocks = prefix.layout.layer_pages(prefix.pool[prefix.table.long()], layer)
            positions = prefix.table.numel() * prefix.layout.block_size + own
            parts += _packed_parts(q, positions, blocks, prefix.layout.layers[layer].page, prefix.sinks[layer], rule)
        return merge(parts).flatten(0, 1).to(query.dtype)
