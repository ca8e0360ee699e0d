"""What the presets promise in bits."""

from __future__ import annotations

import pytest

from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.presets import DEFAULT_PRESET, PRESETS, preset

LIMITS = {"kv2": 2.65, "kv3": 3.35, "kv4": 4.4, "kv16": 16.0}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", PRESETS)
def test_effective_bits_at_4096_tokens(name: str, head_dim: int) -> None:
    layout = BlockLayout(num_layers=3, num_kv_heads=2, head_dim=head_dim, spec=preset(name))
    assert LIMITS[name] - 0.35 < layout.effective_bits(4096) <= LIMITS[name]


def test_preset() -> None:
    assert DEFAULT_PRESET in PRESETS
    assert len({spec.digest() for spec in PRESETS.values()}) == len(PRESETS)
    assert preset("kv2", block_size=256, sink_tokens=8).block_size == 256
    assert preset("kv2", sink_tokens=8).sink_tokens == 8
    with pytest.raises(ValueError, match="no preset 'kv5': choose one of kv2, kv3, kv4, kv16"):
        preset("kv5")
    with pytest.raises(ValueError, match="multiple of 128"):
        preset("kv2", block_size=64)
