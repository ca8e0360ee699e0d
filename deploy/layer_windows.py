"""How each layer of a model scores, and whether it sees only a window of the context: asked of the model itself, by
running it once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvferry.kernels.forward import ROW_COUNTS, CausalModel


class LayerRule(NamedTuple):
    """What a layer gives to `PackedKernels.decode_attention`."""

    scale: float
    window: int | None
    softcap: float | None
    query_heads: int
    query_dtype: torch.dtype


def layer_rules(model: CausalModel, *, device: torch.device) -> tuple[LayerRule, ...]:
    """Of each layer."""
    step = _Recorder()
    zeros = torch.zeros(ROW_COUNTS[0], dtype=torch.long, device=device)
    model.hidden(zeros, zeros, step)
    return tuple(step.rules[layer] for layer in range(model.num_layers))


def layer_windows(model: CausalModel, *, max_model_len: int, device: torch.device) -> tuple[int | None, ...]:
    """Of each layer, in tokens; None for one that sees everything within `max_model_len`."""
    windows = [rule.window for rule in layer_rules(model, device=device)]
    return tuple(None if window is None or window >= max_model_len else window for window in windows)


class _Recorder:
    """`AttentionStep` that keeps each layer's rule."""

    def __init__(self) -> None:
        self.rules: dict[int, LayerRule] = {}

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
        self.rules[layer] = LayerRule(scale, window, softcap, query.shape[1], query.dtype)
        return torch.zeros_like(query)
