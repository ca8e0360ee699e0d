"""The unquantized cache and textbook KIVI: whole windows in one forward pass, through the model seam."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvferry.kernels.forward import AttentionStep, CausalModel
from kvferry.kernels.reference import ScoreRule


class DenseStep:
    """`AttentionStep` on unquantized K and V: all rows are one sequence from position 0 on."""

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
        rule = ScoreRule(scale, window, softcap)
        q, k, v = query.float().transpose(0, 1), per_query_head(key, query), per_query_head(value, query)
        return (weights(q @ k.mT, rule) @ v).transpose(0, 1).to(query.dtype)


def per_query_head(x: Tensor, query: Tensor) -> Tensor:
    """K or V [n, H, D] repeated for the query heads that share it: fp32 [Hq, n, D]."""
    return x.float().repeat_interleave(query.shape[1] // x.shape[1], dim=1).transpose(0, 1)


def weights(products: Tensor, rule: ScoreRule) -> Tensor:
    """Query-key products [Hq, n, n] of one sequence -> probabilities."""
    scores = products * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    positions = torch.arange(scores.shape[-1])
    return scores.masked_fill(~rule.visible(positions, positions), -torch.inf).softmax(-1)


class StepFactory(Protocol):
    def __call__(self, context: int) -> AttentionStep: ...


def dense_logits(model: CausalModel, window: Tensor, step: AttentionStep, *, context: int) -> Tensor:
    """fp32 [P, V]: what follows tokens context .. context + P - 1 of a window of context + P + 1 tokens."""
    hidden = model.hidden(window[:-1], torch.arange(len(window) - 1), step)
    return model.logits(hidden[context:])
