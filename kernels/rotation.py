"""V is rotated before it is stored, and what attention makes of it is rotated back.

Attention is linear in V, so rotating V of every token by one orthogonal matrix R and the output by its inverse changes
nothing but rounding. A Hadamard rotation spreads a channel that sticks out over all of them; one scale then fits the
whole head (QuaRot, arXiv 2404.00456, section 4; here not folded into the weights, which may be quantized themselves).
On the demo model it cuts the error of 2-bit V with groups of 64 sixfold (docs/log.md).

K is not rotated: its channels that stick out are what grouping per channel is for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvferry.kernels.forward import AttentionStep, CausalModel


def hadamard(head_dim: int, device: torch.device | None = None) -> Tensor:
    """Orthogonal symmetric fp32 [D, D]: Hadamard blocks of the largest power of two that divides D."""
    size = head_dim & -head_dim
    block = torch.ones(1, 1)
    while block.shape[0] < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.kron(torch.eye(head_dim // size), block / size**0.5).to(device)


class RotatedStep:
    """`AttentionStep` that gives another one rotated V, and rotates its answer back.

    Both are fp32 matmuls of [rows, D] by [D, D]: a row keeps its bits at every row count of `padded_rows`.
    """

    def __init__(self, step: AttentionStep, rotation: Tensor) -> None:
        """`rotation`: orthogonal and symmetric, fp32 [D, D]."""
        self._step = step
        self._rotation = rotation

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
        rotated = self._rotate(value)
        out = self._step.attend(layer, query.float(), key, rotated, scale=scale, window=window, softcap=softcap)
        return self._rotate(out).to(query.dtype)

    def _rotate(self, x: Tensor) -> Tensor:
        return (x.float().reshape(-1, x.shape[-1]) @ self._rotation).view(x.shape)


class RotatedModel:
    """`CausalModel` whose attention steps see rotated V."""

    def __init__(self, model: CausalModel, device: torch.device) -> None:
        self._model = model
        self._rotation = hadamard(model.head_dim, device)
        self.num_layers = model.num_layers
        self.num_kv_heads = model.num_kv_heads
        self.head_dim = model.head_dim
        self.vocab_size = model.vocab_size
        self.max_model_len = model.max_model_len

    def hidden(self, token_ids: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        return self._model.hidden(token_ids, positions, RotatedStep(step, self._rotation))

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)
