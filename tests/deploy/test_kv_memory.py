"""How much memory the block pool gets."""

from __future__ import annotations

import pytest
import torch

from kvferry.deploy.kv_memory import KVPlan, free_bytes, plan_kv_memory
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.presets import PRESETS

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=1, head_dim=64, spec=PRESETS["kv2"])
SIZE = LAYOUT.block_bytes
CPU = torch.device("cpu")


def plan(kv_memory: float, windows: tuple[int | None, ...] = (None, None), num_slots: int = 4) -> KVPlan:
    return plan_kv_memory(kv_memory, LAYOUT, CPU, windows=windows, num_slots=num_slots, max_model_len=10 * 128)


def test_bytes() -> None:
    assert plan(10 * SIZE + 5)[:3] == (10 * SIZE + 5, 10, 0)


def test_a_share_of_what_is_free() -> None:
    whole, half = plan(1.0), plan(0.5)
    assert whole.num_blocks * SIZE == pytest.approx(free_bytes(CPU), rel=0.2)  # others take and give meanwhile
    assert half.num_blocks == pytest.approx(whole.num_blocks / 2, rel=0.2)


def test_layers_with_a_window_take_their_part_first() -> None:
    """One of two equal layers, with a window of two blocks, for 4 sequences: as much as 4 whole blocks."""
    assert plan(10 * SIZE, (200, None))[1:3] == (12, 4 * SIZE)
    assert plan(10 * SIZE, (200, 100))[1:3] == (4 * 10, 8 * SIZE)


def test_too_little_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"hold no block of \d+ bytes: give the decode worker more memory"):
        plan(SIZE - 1)
    with pytest.raises(ValueError, match=r"4 sequences' windows: .* or fewer max_num_seqs"):
        plan(4 * SIZE, (200, None))


def test_the_sentence() -> None:
    words = str(plan(1000 * SIZE))
    tokens, plain = (int(w.replace(",", "")) for w in (words.split(" tokens")[0].split()[-1], words.split()[-1]))
    assert tokens == 1000 * LAYOUT.block_size
    assert float(words.split(" bits a value")[0].split()[-1]) == pytest.approx(16 * plain / tokens, abs=0.01)
