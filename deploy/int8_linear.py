"""Linear layers with int8 weights: one scale an output, exact integer sums, activations in two int8 terms.

A row of activations x is `scale * (hi + lo / 254)`, hi and lo integers of -127..127: sixteen bits or so, so that only
the weights lose anything. Both terms are rows of one integer matmul. Integer sums do not depend on their order, so a
row has the same bits at every row count and with any number of threads, by construction.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

LIMIT = 127  # largest code; -128 is not used
SECOND = 2 * LIMIT  # the second term counts in steps of 1 / SECOND of the first's
MAX_INPUTS = 2**31 // (255 * LIMIT)  # more could overflow an int32 sum
TINY = 1e-30  # scale of a row or an output of zeros


class Int8Linear(nn.Module):
    """`nn.Linear` for inference on a CPU. Copies what it needs of `linear`; raises ValueError if that is too wide."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if self.in_features > MAX_INPUTS:
            raise ValueError(f"a linear layer of {self.in_features} inputs is too wide for int8: at most {MAX_INPUTS}")
        self.dtype = linear.weight.dtype
        self.bias: Tensor | None
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        codes, scales = quantize_rows(linear.weight.detach())
        self.register_buffer("scales", scales)
        self.register_buffer("codes_digest", _digest(codes))
        # Opaque to torch: neither a buffer nor in the state dict, where the digest above stands for it.
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
        self._zeros = torch.zeros(self.out_features, dtype=torch.int64)

    @property
    def num_bytes(self) -> int:
        """Codes, scales and bias; what the library pads is not counted."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.in_features * self.out_features + 4 * self.out_features + bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], of x's dtype."""
        rows = x.reshape(-1, self.in_features)
        terms, scale = split_rows(rows)
        out = torch.ops.onednn.qlinear_pointwise(
            (terms + 128).to(torch.uint8), 1.0, 128, self._packed, self.scales, self._zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        high, low = out.chunk(2)
        result = torch.add(high, low, alpha=1 / SECOND).mul_(scale)
        if self.bias is not None:
            result += self.bias
        return result.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> int8 codes [out, in], fp32 scales [out]; a code c stands for c * scale."""
    weight = weight.float()
    scales = weight.abs().amax(1).clamp_min(TINY) / LIMIT
    return (weight / scales[:, None]).round().to(torch.int8).contiguous(), scales


def split_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, in] -> fp32 integers [2 n, in] (all first terms, then all second ones) and fp32 scales [n, 1]."""
    values = rows.float()
    scale = values.abs().amax(1, keepdim=True).clamp_min(TINY) / LIMIT
    values = values / scale
    high = values.round()
    return torch.cat([high, ((values - high) * SECOND).round()]), scale


def sums_are_exact() -> bool:
    """Whether this CPU's int8 matmul is: without VNNI, some instructions saturate sums of two products."""
    inputs, outputs = 576, 64
    codes = torch.full((outputs, inputs), LIMIT, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    scales, zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)
    for rows in (8, 128):
        x = torch.full((rows, inputs), 128 + LIMIT, dtype=torch.uint8)
        out = torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        if not bool((out == inputs * LIMIT * LIMIT).all()):
            return False
    return True


def _digest(codes: Tensor) -> Tensor:
    """SHA-256 of the codes, as uint8 [32]."""
    return torch.tensor(list(hashlib.sha256(codes.numpy().data).digest()), dtype=torch.uint8)
