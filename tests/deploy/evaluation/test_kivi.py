"""The KIVI baseline against KIVI written down step by step, as its paper and code do it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvferry.deploy.evaluation import kivi
from kvferry.deploy.evaluation.dense import DenseStep
from kvferry.deploy.evaluation.kivi import KiviStep

R, G = 128, 32


def fake_quantized(x: Tensor, bits: int) -> Tensor:
    """Min/max over the last dimension, one group."""
    low, high = x.min(), x.max()
    scale = ((high - low) / (2**bits - 1)).half().float()
    return torch.round(torch.clamp((x - low) / scale, 0, 2**bits - 1)) * scale + low


class StepwiseKivi:
    """One layer's cache, a token at a time: quantized K and V, and fp16 residuals, as in KIVI's attention."""

    def __init__(self, keys: Tensor, values: Tensor, bits: int) -> None:
        """keys, values fp32 [H, T, D] of the prompt, T at least R."""
        self.bits = bits
        cut = keys.shape[1] // R * R
        self.k_quant = self._keys(keys[:, :cut])
        self.k_full = keys[:, cut:]
        self.v_quant = self._values(values[:, :-R])
        self.v_full = values[:, -R:]

    def _keys(self, k: Tensor) -> Tensor:
        out = k.clone()
        for h in range(k.shape[0]):
            for begin in range(0, k.shape[1], G):
                for c in range(k.shape[2]):
                    out[h, begin : begin + G, c] = fake_quantized(k[h, begin : begin + G, c], self.bits)
        return out

    def _values(self, v: Tensor) -> Tensor:
        out = v.clone()
        for h in range(v.shape[0]):
            for t in range(v.shape[1]):
                for begin in range(0, v.shape[2], G):
                    out[h, t, begin : begin + G] = fake_quantized(v[h, t, begin : begin + G], self.bits)
        return out

    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [Hq, D], key and value [H, D] of one new token -> [Hq, D]."""
        self.k_full = torch.cat([self.k_full, key[:, None]], 1)
        k = torch.cat([self.k_quant, self.k_full], 1)
        if self.k_full.shape[1] == R:
            self.k_quant = torch.cat([self.k_quant, self._keys(self.k_full)], 1)
            self.k_full = self.k_full[:, :0]
        self.v_full = torch.cat([self.v_full, value[:, None]], 1)
        v = torch.cat([self.v_quant, self.v_full], 1)
        if self.v_full.shape[1] > R:
            self.v_quant = torch.cat([self.v_quant, self._values(self.v_full[:, :1])], 1)
            self.v_full = self.v_full[:, 1:]
        groups = query.shape[0] // key.shape[0]
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        p = (torch.einsum("hd,htd->ht", query, k) * scale).softmax(-1)
        return torch.einsum("ht,htd->hd", p, v)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("context", [128, 250])
def test_one_pass_is_kivi_step_by_step(bits: int, context: int) -> None:
    """Over a step at which 128 keys are quantized."""
    n = context + 20
    query, key, value = torch.randn(n, 4, 32), torch.randn(n, 2, 32).half(), torch.randn(n, 2, 32).half()
    rule = {"scale": 0.2, "window": None, "softcap": None}
    out = KiviStep(context, bits=bits).attend(0, query, key, value, **rule)  # type: ignore[arg-type]
    prompt = DenseStep().attend(0, query, key, value, **rule)[:context]  # type: ignore[arg-type]
    assert torch.allclose(out[:context], prompt, atol=1e-5)
    k, v = key.float().transpose(0, 1), value.float().transpose(0, 1)
    cache = StepwiseKivi(k[:, :context], v[:, :context], bits)
    for t in range(context, n):
        expected = cache.step(query[t], k[:, t], v[:, t], 0.2)
        assert torch.allclose(out[t], expected, atol=1e-4), t


def test_a_constant_group_keeps_its_value() -> None:
    assert torch.equal(kivi.quantized_keys(torch.full((64, 1, 32), 3.0).half(), 2), torch.full((64, 1, 32), 3.0))


def test_effective_bits() -> None:
    assert kivi.effective_bits(4096, 2) == pytest.approx(3 + 13 * 128 / 8192)
    assert kivi.effective_bits(100, 4) == 16.0
