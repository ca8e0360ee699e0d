"""How much memory the block pool gets."""

from __future__ import annotations

import pytest
import torch

from kvferry.deploy.kv_memory import free_bytes, pool_blocks, what_fits
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.presets import PRESETS

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=1, head_dim=64, spec=PRESETS["kv2"])
CPU = torch.device("cpu")


def test_bytes() -> None:
    assert pool_blocks(10 * LAYOUT.block_bytes + 5, LAYOUT, CPU) == 10


def test_a_share_of_what_is_free() -> None:
    whole, half = pool_blocks(1.0, LAYOUT, CPU), pool_blocks(0.5, LAYOUT, CPU)
    assert whole * LAYOUT.block_bytes == pytest.approx(free_bytes(CPU), rel=0.2)  # others take and give meanwhile
    assert half == pytest.approx(whole / 2, rel=0.2)


def test_too_little_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"holds no block of \d+ bytes: give the decode worker more memory"):
        pool_blocks(LAYOUT.block_bytes - 1, LAYOUT, CPU)


def test_the_sentence() -> None:
    num_blocks = 1000
    words = what_fits(num_blocks, LAYOUT)
    tokens, plain = (int(w.replace(",", "")) for w in (words.split(" tokens")[0].split()[-1], words.split()[-1]))
    assert tokens == num_blocks * LAYOUT.block_size
    bits = 16 * plain / tokens
    assert f"{bits:.2f} bits" in words or f"{bits:.1f}" in words
