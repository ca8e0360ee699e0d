"""Quantization specs as files: JSON that `kvferry calibrate` writes and `spec:` of a configuration names."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from kvferry.kernels.presets import PRESETS, preset
from kvferry.kernels.spec import KVQuantSpec, LayerSpec, TensorSpec


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Tensor(_Strict):
    bits: int = 2
    group_size: int = 32
    scales: str = "fp16"
    boost: int = 0


class _Layer(_Strict):
    key: _Tensor = _Tensor()
    value: _Tensor = _Tensor()

    def spec(self) -> LayerSpec:
        return LayerSpec(key=TensorSpec(**self.key.model_dump()), value=TensorSpec(**self.value.model_dump()))


class _File(_Strict):
    layer: _Layer
    layers: dict[int, _Layer] = {}
    fit: str = "least-squares"
    value_rotation: str = "none"
    sink_tokens: int = 4
    block_size: int = 128


def spec_to_json(spec: KVQuantSpec) -> str:
    """One spec, for people to read and `read_spec` to load."""
    fields = asdict(spec)
    overrides = fields.pop("overrides")
    layers = {"layer": fields.pop("layer"), "layers": {str(index): layer for index, layer in overrides}}
    return json.dumps(layers | fields, indent=2) + "\n"


def spec_from_json(text: str) -> KVQuantSpec:
    """Raises ValueError; pydantic's ValidationError, which names the field, is one."""
    file = _File.model_validate(json.loads(text))
    rest = file.model_dump(exclude={"layer", "layers"})
    overrides = tuple((index, layer.spec()) for index, layer in sorted(file.layers.items()))
    return KVQuantSpec(layer=file.layer.spec(), overrides=overrides, **rest)


def read_spec(path: Path) -> KVQuantSpec:
    """Raises ValueError, which names the file and the field, or OSError."""
    try:
        return spec_from_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path} is no quantization spec: {where}: {first['msg']}") from error
    except ValueError as error:  # no JSON, no text, or a spec that cannot be
        raise ValueError(f"{path} is no quantization spec: {error}") from error


def resolve_spec(name: str, *, block_size: int | None = None, sink_tokens: int | None = None) -> KVQuantSpec:
    """A preset by name, or the spec in a .json file. Raises ValueError or OSError."""
    if name in PRESETS:
        return preset(name, block_size=block_size, sink_tokens=sink_tokens)
    if not name.endswith(".json"):
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}, or a .json file of a spec")
    if block_size is not None or sink_tokens is not None:
        raise ValueError(f"{name} says block_size and sink_tokens itself: set neither beside it")
    return read_spec(Path(name))
