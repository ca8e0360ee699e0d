"""Named quantization specs. Effective bits are at 4,096 tokens, everything counted, head_dim 64; docs/fidelity.md
has what each costs."""

from __future__ import annotations

from dataclasses import replace

from kvferry.kernels.spec import KVQuantSpec, LayerSpec, TensorSpec

_ROTATED_V2 = TensorSpec(bits=2, group_size=64, scales="8bit")
_ROTATED_V4 = TensorSpec(bits=4, group_size=64, scales="8bit")

PRESETS = {
    "kv2": KVQuantSpec(
        layer=LayerSpec(key=TensorSpec(bits=2, group_size=128, scales="8bit", boost=6), value=_ROTATED_V2),
        value_rotation="hadamard",
    ),
    "kv3": KVQuantSpec(
        layer=LayerSpec(key=TensorSpec(bits=4, group_size=64, scales="8bit"), value=_ROTATED_V2),
        value_rotation="hadamard",
    ),
    "kv4": KVQuantSpec(
        layer=LayerSpec(key=TensorSpec(bits=4, group_size=64, scales="8bit", boost=1), value=_ROTATED_V4),
        value_rotation="hadamard",
        sink_tokens=2,
    ),
    "kv16": KVQuantSpec(layer=LayerSpec(key=TensorSpec(bits=16), value=TensorSpec(bits=16)), sink_tokens=0),
}
"""kv2, kv3, kv4: about 2.6, 3.3 and 4.3 bits. kv16 keeps fp16: the baseline in every comparison."""

DEFAULT_PRESET = "kv2"


def preset(name: str, *, block_size: int | None = None, sink_tokens: int | None = None) -> KVQuantSpec:
    """The preset, with another block size or number of sinks where given. Raises ValueError."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
    spec = PRESETS[name]
    if block_size is not None:
        spec = replace(spec, block_size=block_size)
    if sink_tokens is not None:
        spec = replace(spec, sink_tokens=sink_tokens)
    return spec
