"""int8 weights: the linear layer against its definition, rows, identity, refusals and memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from kvferry.deploy.causal_lm import UnsupportedModel
from kvferry.deploy.int8_linear import Int8Linear, quantize_rows, split_rows, sums_are_exact
from kvferry.deploy.models import LoadedModel, find_model, load_model
from kvferry.deploy.numerics import rows_are_invariant
from kvferry.deploy.row_invariance import linears_keep_rows
from kvferry.deploy.settings import Settings
from kvferry.deploy.weight_quantization import quantize_weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _needs_exact_sums() -> None:
    if not sums_are_exact():
        pytest.skip("this CPU's int8 matmul saturates")


def make_linear(
    inputs: int, outputs: int, *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> torch.nn.Linear:
    torch.manual_seed(inputs + outputs)
    return torch.nn.Linear(inputs, outputs, bias=bias).to(dtype)


def load(folder: Path, weights: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_model(find_model(str(folder)), device=CPU, dtype=dtype, weight_quantization=weights)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (63, 5), (193, 77), (576, 1536)])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_it_is_what_its_codes_say(inputs: int, outputs: int, bias: bool) -> None:
    linear = make_linear(inputs, outputs, bias=bias)
    codes, scales = quantize_rows(linear.weight)
    x = torch.randn(2, 7, inputs) * torch.logspace(-6, 6, 7)[:, None]
    x[0, 0] = 0
    exact = x.double() @ (codes.double() * scales.double()[:, None]).T
    if bias:
        exact += linear.bias.double()
    error = (Int8Linear(linear)(x).double() - exact).abs()
    # Half a step of the second term for each input, times the codes; then fp32 roundings.
    step = x.abs().amax(-1, keepdim=True).double() / 127 / 254
    weight = (codes.double() * scales.double()[:, None]).abs().sum(1)
    assert bool((error <= 0.51 * step * weight + 1e-5 * (exact.abs() + 1)).all())


def test_terms_add_up_to_the_row() -> None:
    x = torch.randn(5, 33)
    terms, scale = split_rows(x)
    high, low = terms.chunk(2)
    assert bool((terms == terms.round()).all()) and terms.abs().max() == 127
    assert torch.allclose((high + low / 254) * scale, x, atol=float(scale.max()) / 254)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    layers = [Int8Linear(make_linear(i, o, bias=True, dtype=dtype)) for i, o in ((192, 64), (576, 192), (63, 130))]
    assert linears_keep_rows(layers, max_rows=256)
    for layer in layers:
        x = torch.randn(67, layer.in_features).to(dtype)
        alone = torch.cat([layer(row[None]) for row in x])
        assert torch.equal(layer(x), alone) and alone.dtype == dtype
        assert torch.equal(layer(x.flip(0)), alone.flip(0))


@torch.inference_mode()
def test_threads_change_nothing() -> None:
    layer, x = Int8Linear(make_linear(576, 1536)), torch.randn(9, 576)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(layer(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_too_wide_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="too wide for int8"):
        Int8Linear(torch.nn.Linear(70_000, 1, bias=False))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_has_int8_layers_and_another_identity(family: str, tiny_model: Callable[[str], Path]) -> None:
    plain, quantized = load(tiny_model(family), "none"), load(tiny_model(family), "int8")
    linears = quantized.model.distinct_linears()
    assert linears and all(isinstance(linear, Int8Linear) for linear in linears)
    assert any(linear.out_features == quantized.model.vocab_size for linear in linears)  # the output layer, too
    assert rows_are_invariant(quantized.model, rotated=True, max_rows=64)
    assert quantized.weights_digest != plain.weights_digest
    assert quantized.weights_digest == load(tiny_model(family), "int8").weights_digest


def test_a_code_counts_in_the_digest() -> None:
    linear = make_linear(64, 64)
    before = Int8Linear(linear).state_dict()
    with torch.no_grad():
        linear.weight[3, 5] = -linear.weight[3, 5]  # the scales stay
    after = Int8Linear(linear).state_dict()
    assert torch.equal(before["scales"], after["scales"])
    assert not torch.equal(before["codes_digest"], after["codes_digest"])


def test_bytes_are_counted(tiny_model: Callable[[str], Path]) -> None:
    """A llama of three layers, 192 wide, 6 query and 2 KV heads of 64; the embedding is tied to the output layer."""
    norms, layer = 7 * 192, 192 * (384 + 128 + 128) + 384 * 192 + 3 * 192 * 192
    outputs = 3 * (384 + 128 + 128 + 4 * 192) + 49152
    rope = 2 * 32 * 4  # two fp32 buffers of frequencies
    embedding = 49152 * 192
    # The output layer is a packed copy of the embedding.
    assert load(tiny_model("llama"), "none").weight_bytes == 4 * (norms + 3 * layer + 2 * embedding) + rope
    expected = 4 * (norms + embedding) + 3 * layer + embedding + 4 * outputs + rope
    assert load(tiny_model("llama"), "int8").weight_bytes == expected


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValidationError, match="weight_quantization"):
        Settings.load(weight_quantization="int3")
    with pytest.raises(ValueError, match="'int3' is not one of none, int8"):
        quantize_weights(torch.nn.Linear(2, 2), "int3", CPU)
    with pytest.raises(UnsupportedModel, match="on a CPU only, not on cuda"):
        quantize_weights(torch.nn.Linear(2, 2), "int8", torch.device("cuda"))


def test_a_quantized_checkpoint_is_refused_by_its_method(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"quantized already \(gptq\): give an unquantized one"):
        load(tmp_path, "none")
