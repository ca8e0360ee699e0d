"""Rotating V changes nothing but rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvferry.kernels.rotation import RotatedStep, hadamard


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_hadamard_is_orthogonal_and_symmetric(head_dim: int) -> None:
    h = hadamard(head_dim)
    assert torch.equal(h, h.T)
    assert torch.allclose(h @ h, torch.eye(head_dim), atol=1e-6)


def test_hadamard_spreads_a_channel_over_the_head() -> None:
    spike = torch.zeros(64)
    spike[11] = 8.0
    assert torch.equal((spike @ hadamard(64)).abs(), torch.ones(64))
    assert int((torch.eye(80)[5] @ hadamard(80)).count_nonzero()) == 16


class CausalStep:
    """Plain causal attention over the rows of one call; keeps the V that it was given."""

    value: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **rule: Any) -> Tensor:
        self.value = value
        groups = query.shape[1] // key.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (key.float(), value.float()))
        out = torch.nn.functional.scaled_dot_product_attention(
            query.float().transpose(0, 1), k, v, is_causal=True, scale=rule["scale"]
        )
        return out.transpose(0, 1).to(query.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_rotated_step_is_the_step(head_dim: int, dtype: torch.dtype) -> None:
    query = torch.randn(12, 4, head_dim).to(dtype)
    key, value = torch.randn(2, 2, 12, head_dim).to(dtype).transpose(1, 2)  # strided, as a model gives them
    rule: dict[str, Any] = {"scale": 0.1, "window": None, "softcap": None}
    inner = CausalStep()
    out = RotatedStep(inner, hadamard(head_dim)).attend(0, query, key, value, **rule)
    expected = CausalStep().attend(0, query, key, value, **rule)
    assert out.dtype == dtype and out.shape == expected.shape
    assert torch.allclose(out.float(), expected.float(), atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert not torch.allclose(inner.value.float(), value.float(), atol=0.5)


def test_a_row_does_not_depend_on_the_number_of_rows() -> None:
    x = torch.randn(48, 3, 64)
    step = RotatedStep(CausalStep(), hadamard(64))
    whole = step._rotate(x)
    for rows in (4, 8, 12, 16, 48):
        assert torch.equal(step._rotate(x[:rows]), whole[:rows])
