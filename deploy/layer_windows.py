"""Which layers of a model see only a window of the context: asked of the model itself, by running it once."""

from __future__ import annotations

import torch
from torch import Tensor

from kvferry.kernels.forward import ROW_COUNTS, CausalModel


def layer_windows(model: CausalModel, *, max_model_len: int, device: torch.device) -> tuple[int | None, ...]:
    """Of each layer, in tokens; None for one that sees everything within `max_model_len`."""
    step = _Recorder(model.num_layers)
    zeros = torch.zeros(ROW_COUNTS[0], dtype=torch.long, device=device)
    model.hidden(zeros, zeros, step)
    return tuple(None if window is None or window >= max_model_len else window for window in step.windows)


class _Recorder:
    """`AttentionStep` that keeps each layer's window."""

    def __init__(self, num_layers: int) -> None:
        self.windows: list[int | None] = [None] * num_layers

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
        self.windows[layer] = window
        return torch.zeros_like(query)
