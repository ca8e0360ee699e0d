"""How many ranks a deployment has: what is refused, and in which words."""

from __future__ import annotations

import pytest

from kvferry.deploy.model_config import ModelConfig
from kvferry.deploy.rank_counts import RankCounts, threads_of_rank
from kvferry.deploy.settings import Settings


def settings(prefill: int, decode: int, *, prefill_workers: int = 1) -> Settings:
    """Of the demo model: 3 KV heads, 9 query heads."""
    return Settings.load(
        model="demo",
        prefill={"tensor_parallel": prefill, "count": prefill_workers},
        decode={"tensor_parallel": decode, "count": 2},
    )


def test_sizes_are_those_of_the_settings() -> None:
    counts = RankCounts.of(settings(3, 9))
    assert (counts.prefill, counts.decode, counts.total) == (3, 9, 21)


@pytest.mark.parametrize(
    ("prefill", "decode", "problem"),
    [(2, 1, "2 ranks cannot share 3 KV heads"), (1, 4, "4 ranks"), (1, 6, "6 ranks cannot share 9 query heads")],
)
def test_heads_that_cannot_be_shared_are_refused(prefill: int, decode: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        RankCounts.of(settings(prefill, decode))


def test_ranks_for_prefill_workers_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prefill\.count is 0"):
        RankCounts.of(settings(3, 3, prefill_workers=0))


def test_gpus() -> None:
    one, several = RankCounts.of(settings(1, 1)), RankCounts.of(settings(3, 1))
    assert one.gpus(1, available=0) == several.gpus(3, available=0) == 0
    assert one.gpus(1, available=1.5) == 0.5  # three workers share them
    assert several.gpus(3, available=8) == 3
    with pytest.raises(ValueError, match="5 ranks, and there are 4 GPUs"):
        several.gpus(3, available=4)


def test_ranks_share_the_cores() -> None:
    loaded = Settings.load(model="demo")
    assert [threads_of_rank(loaded, size, num_cores=8) for size in (1, 3, 9)] == [8, 2, 1]
    assert threads_of_rank(Settings.load(model="demo", threads=2), 3, num_cores=8) == 2


def test_pipeline_parallelism_is_refused() -> None:
    with pytest.raises(ValueError, match="layers cannot be spread over workers"):
        Settings.load(model="demo", decode={"pipeline_parallel": 2})


def test_int8_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="do not go together"):
        ModelConfig(model="demo", weight_quantization="int8", tensor_parallel=3)
