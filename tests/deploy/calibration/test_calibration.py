"""`kvferry calibrate`: the budget, the search, and a model whose key bias only calibration can see."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvferry.deploy.calibration import command
from kvferry.deploy.calibration.budget import Choice, Place, spend
from kvferry.deploy.calibration.command import LADDERS, CalibrationPlan, run_calibration
from kvferry.deploy.spec_file import read_spec
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.presets import PRESETS
from kvferry.kernels.spec import TensorSpec

BIASED_LAYER = 0


def layout(num_layers: int = 3) -> BlockLayout:
    return BlockLayout(num_layers=num_layers, num_kv_heads=2, head_dim=64, spec=PRESETS["kv2"])


def ladders(kl: Callable[[Place, TensorSpec], float]) -> dict[Place, list[Choice]]:
    return {
        Place(index, side): [Choice(tensor, kl(Place(index, side), tensor)) for tensor in ladder]
        for index in range(3)
        for side, ladder in LADDERS.items()
    }


def test_the_budget_goes_where_it_helps_most() -> None:
    """Layer 1's keys lose a hundred times what the others do."""
    shape = layout()
    measured = ladders(lambda place, t: (100 if place == (1, "key") else 1) * 4.0 ** (2 - t.bits))
    spec = spend(shape, measured, bits=2.95, bits_context=4096)
    assert spec.of_layer(1).key.bits > max(spec.of_layer(i).key.bits for i in (0, 2))
    assert spec.value_rotation == "hadamard" and spec.block_size == 128
    for bits in (2.6, 3.0, 4.0, 9.0, 16.0):
        spec = spend(shape, measured, bits=bits, bits_context=4096)
        used = BlockLayout(num_layers=3, num_kv_heads=2, head_dim=64, spec=spec).effective_bits(4096)
        assert bits - 1.2 < used <= bits
    with pytest.raises(ValueError, match=r"the budget of 2.0 bits is below the least, 2\.59"):
        spend(shape, measured, bits=2.0, bits_context=4096)


def test_nothing_is_spent_where_it_does_not_help() -> None:
    spec = spend(layout(), ladders(lambda place, t: 0.5), bits=16.0, bits_context=4096)
    assert spec.layer.key == LADDERS["key"][0] and not spec.overrides


@pytest.fixture(scope="module")
def biased_model(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with key biases of the size that Qwen2.5's first layers have, in one layer."""
    folder = tmp_path_factory.mktemp("biased") / "model"
    shutil.copytree(tiny_model("qwen2"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:  # a calm model: random ones feel every rounding in every layer
            layer.self_attn.k_proj.bias.mul_(0.1)
            layer.self_attn.q_proj.weight.mul_(0.3)
            layer.self_attn.k_proj.weight.mul_(0.3)
            layer.self_attn.o_proj.weight.mul_(0.3)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.model.layers[BIASED_LAYER].self_attn.k_proj.bias, std=60.0)
    model.save_pretrained(folder)
    return folder


def plan(model: Path, **changes: Any) -> CalibrationPlan:
    options: dict[str, Any] = {"model": str(model), "bits": 4.0, "text": None, "windows": 1, "window_blocks": 3}
    return CalibrationPlan(**options | changes)


def test_a_layer_with_huge_key_biases_is_found(
    biased_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "spec.json"
    spec = run_calibration(plan(biased_model), out)
    assert read_spec(out) == spec
    keys = [spec.of_layer(index).key.bits for index in range(3)]
    assert keys[BIASED_LAYER] >= 8 > max(keys[:BIASED_LAYER] + keys[BIASED_LAYER + 1 :])
    assert "serve it with" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]


def test_an_interrupted_run_goes_on(biased_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run measures only what the first one did not, and comes to the same spec."""
    whole = run_calibration(plan(biased_model), tmp_path / "whole.json")
    measured: list[int] = []
    kl = command.Yardstick.kl

    def failing(self: Any, step: Any) -> float:
        measured.append(1)
        if len(measured) == 5:
            raise RuntimeError("power cut")
        return kl(self, step)

    monkeypatch.setattr(command.Yardstick, "kl", failing)
    out = tmp_path / "spec.json"
    with pytest.raises(RuntimeError, match="power cut"):
        run_calibration(plan(biased_model), out)
    assert not out.exists()
    assert len(json.loads((tmp_path / "spec.json.progress").read_text())["measured"]) == 4
    assert run_calibration(plan(biased_model), out) == whole
    assert len(measured) == 5 + 3 * 2 * 3 - 4


def test_measurements_of_another_text_are_not_used(
    biased_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "spec.json"
    (tmp_path / "spec.json.progress").write_text('{"fingerprint": "other", "measured": {"x": "y"}}')
    assert run_calibration(plan(biased_model), out) == read_spec(out)


def test_a_budget_that_cannot_be_is_refused_before_the_work(
    biased_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "Yardstick", None)
    with pytest.raises(ValueError, match="below the least"):
        run_calibration(plan(biased_model, bits=2.1), tmp_path / "spec.json")
    with pytest.raises(ValueError, match="do not fit"):
        run_calibration(plan(biased_model, window_blocks=30), tmp_path / "spec.json")
