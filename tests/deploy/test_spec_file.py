"""Quantization specs as files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvferry.deploy.spec_file import read_spec, resolve_spec, spec_to_json
from kvferry.kernels.presets import PRESETS
from kvferry.kernels.spec import KVQuantSpec, LayerSpec, TensorSpec

OVERRIDDEN = replace(
    PRESETS["kv2"],
    overrides=((0, LayerSpec(key=TensorSpec(bits=16))), (11, LayerSpec(value=TensorSpec(bits=8)))),
    sink_tokens=8,
)


@pytest.mark.parametrize("spec", [*PRESETS.values(), OVERRIDDEN, KVQuantSpec()], ids=str)
def test_round_trip(spec: KVQuantSpec, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(spec_to_json(spec))
    assert read_spec(path) == spec == resolve_spec(str(path))
    assert read_spec(path).digest() == spec.digest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no quantization spec: Expecting value"),
        ("[]", "the file: "),
        ("{}", "layer: Field required"),
        ({"layer": {"key": {"bits": 3}}}, "bits 3 is not one of"),
        ({"layer": {"key": {"bit": 2}}}, "layer.key.bit: Extra inputs"),
        ({"layer": {}, "layers": {"x": {}}}, "layers.x"),
        ({"layer": {}, "layers": {"-1": {}}}, "must ascend"),
        ({"layer": {}, "block_size": 40}, "block_size 40"),
    ],
    ids=str,
)
def test_bad_files_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        read_spec(path)
    assert str(path) in str(error.value)


def test_resolve_spec(tmp_path: Path) -> None:
    assert resolve_spec("kv3", sink_tokens=2) == replace(PRESETS["kv3"], sink_tokens=2)
    with pytest.raises(ValueError, match="no preset 'kv9': choose one of kv2, kv3, kv4, kv16, or a"):
        resolve_spec("kv9")
    with pytest.raises(OSError):
        resolve_spec(str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match="set neither"):
        resolve_spec("some.json", block_size=64)
