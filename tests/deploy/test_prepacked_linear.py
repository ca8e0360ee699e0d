"""Prepacked weights: the same function, row by row, and in bf16 the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvferry.deploy import models
from kvferry.deploy.models import find_model, load_model
from kvferry.deploy.prepacked_linear import PrepackedLinear, can_prepack
from kvferry.deploy.row_invariance import distinct_linears, linears_keep_rows

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(not can_prepack(CPU, torch.bfloat16), reason="this CPU has no bf16 matmul")


def pair(dtype: torch.dtype, inputs: int, outputs: int, bias: bool) -> tuple[torch.nn.Linear, PrepackedLinear]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    return linear, PrepackedLinear(linear)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (192, 576), (64, 1000)])
@torch.inference_mode()
def test_fp32_agrees(inputs: int, outputs: int, bias: bool) -> None:
    linear, packed = pair(torch.float32, inputs, outputs, bias)
    for shape in ((4, inputs), (1, 12, inputs), (1, 130, inputs)):
        x = torch.randn(shape)
        torch.testing.assert_close(packed(x), linear(x), rtol=1e-4, atol=1e-5)


@needs_native
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_bf16_has_the_same_bits(bias: bool) -> None:
    linear, packed = pair(torch.bfloat16, 576, 192, bias)
    for rows in (4, 8, 12, 31, 128):
        x = torch.randn(rows, 576).bfloat16()
        assert torch.equal(packed(x), linear(x))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_native)])
def test_rows_keep_their_bits(dtype: torch.dtype) -> None:
    assert linears_keep_rows([pair(dtype, i, o, False)[1] for i, o in ((576, 1536), (1536, 576))], max_rows=256)


def test_a_loaded_model_is_prepacked_and_its_digest_is_that_of_the_weights(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_model(str(tiny_model("qwen2")))
    packed = load_model(source, device=CPU, dtype=torch.float32)
    assert {type(linear) for linear in packed.model.distinct_linears()} == {PrepackedLinear}
    monkeypatch.setattr(models, "can_prepack", lambda device, dtype: False)
    plain = load_model(source, device=CPU, dtype=torch.float32)
    assert {type(linear) for linear in plain.model.distinct_linears()} == {torch.nn.Linear}
    assert packed.weights_digest == plain.weights_digest


def test_where_rows_would_change_the_weights_stay(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(models, "linears_keep_rows", lambda linears, max_rows: False)
    loaded = load_model(find_model(str(tiny_model("llama"))), device=CPU, dtype=torch.float32)
    assert {type(linear) for linear in distinct_linears(loaded.model._model)} == {torch.nn.Linear}
    assert "do not keep a row's bits" in caplog.text
