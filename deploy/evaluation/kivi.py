"""Textbook KIVI as a baseline (arXiv 2402.02750, section 3 and algorithm 1; residual length 128, groups of 32).

Prefill attends to unquantized K and V. Then, while decoding, a query at position t sees

    K of tokens before t - t mod R quantized, the others in fp16     (R tokens are quantized together when R are there)
    V of tokens before t - R quantized, the newest R + 1 in fp16     (one token leaves the window at each step)

so all decode steps of a forced text fit one forward pass with two versions of K and of V. Codes are min/max, scale and
minimum fp16. A group of equal values, which divides by zero in the original, keeps its value here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvferry.deploy.evaluation.dense import per_query_head, weights
from kvferry.kernels.reference import ScoreRule

GROUP = 32
RESIDUAL = 128


class KiviStep:
    """`AttentionStep` of a prompt of `context` tokens and the decode steps after it, in one pass."""

    def __init__(self, context: int, *, bits: int) -> None:
        self._context = context
        self._bits = bits

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        n = query.shape[0]
        k, v = key.half(), value.half()
        packed_k, packed_v = quantized_keys(k, self._bits), quantized_values(v, self._bits)
        position, other = torch.arange(n)[:, None], torch.arange(n)
        decoding = position >= self._context
        k_packed = decoding & (other < position - position % RESIDUAL)
        v_packed = decoding & (other < position - RESIDUAL)
        q = query.float().transpose(0, 1)
        exact, packed = q @ per_query_head(k, query).mT, q @ per_query_head(packed_k, query).mT
        p = weights(torch.where(k_packed, packed, exact), ScoreRule(scale, window, softcap))
        out = (p * ~v_packed) @ per_query_head(v, query) + (p * v_packed) @ per_query_head(packed_v, query)
        return out.transpose(0, 1).to(query.dtype)


def quantized_keys(keys: Tensor, bits: int) -> Tensor:
    """fp16 [n, H, D] -> fp32, in groups of 32 tokens of a channel; an incomplete last group stays as it is."""
    whole = keys.shape[0] // GROUP * GROUP
    groups = torch.unflatten(keys[:whole], 0, (-1, GROUP))
    return torch.cat([_min_max(groups, 1, bits).flatten(0, 1), keys[whole:].float()])


def quantized_values(values: Tensor, bits: int) -> Tensor:
    """fp16 [n, H, D] -> fp32, in groups of 32 channels of a token."""
    return _min_max(torch.unflatten(values, -1, (-1, GROUP)), -1, bits).flatten(-2)


def _min_max(x: Tensor, dim: int, bits: int) -> Tensor:
    top = (1 << bits) - 1
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / top).half().float()
    codes = ((x - low) / scale.clamp_min(2.0**-24)).clamp(0, top).round()
    return codes * scale + low


def effective_bits(num_tokens: int, bits: int) -> float:
    """Codes, fp16 scales and minima, and the fp16 windows of K and V, at this length."""
    packed = bits + 2 * 16 / GROUP
    k_fp, v_fp = num_tokens % RESIDUAL, min(RESIDUAL, num_tokens)
    return packed + (16 - packed) * (k_fp + v_fp) / (2 * num_tokens)
