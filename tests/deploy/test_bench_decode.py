"""`kvferry bench decode` on a tiny model: real engine, real transformers, short contexts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache
from typer.testing import CliRunner

from kvferry.deploy.benchmark.context import dynamic_cache, prefilled_blocks, random_blocks
from kvferry.deploy.benchmark.decode_run import DecodeBench, DecodeCase, DecodePlan
from kvferry.deploy.benchmark.packed_decoder import PackedDecoder
from kvferry.deploy.benchmark.transformers_decoder import quantized_backend
from kvferry.deploy.cli import app
from kvferry.deploy.worker_server import ModelRuntime

RATIOS = {"ratio": "transformers_ms", "ratio_cpu": "transformers_cpu_ms", "ratio_min": "transformers_min_ms"}


@pytest.fixture(scope="module")
def tiny_runtime(load_runtime: Callable[..., ModelRuntime]) -> Iterator[ModelRuntime]:
    runtime = load_runtime()
    yield runtime
    runtime.close()


def same_steps(cases: list[DecodeCase], plan: DecodePlan) -> None:
    for case in cases:
        assert case.steps == plan.steps * plan.rounds
        assert 0 < case.kvferry_min_ms <= case.kvferry_ms and 0 < case.transformers_min_ms <= case.transformers_ms
        assert case.ratio == pytest.approx(case.transformers_ms / case.kvferry_ms)
        assert case.ratio_cpu == pytest.approx(case.transformers_cpu_ms / case.kvferry_cpu_ms)


def test_every_batch_and_context(tiny_runtime: ModelRuntime) -> None:
    plan = DecodePlan(contexts=(70, 96), batches=(1, 3), steps=2, rounds=2)
    rounds: list[str] = []
    bench = DecodeBench(tiny_runtime)
    cases = list(bench.run(plan, on_round=rounds.append))
    assert [(case.batch, case.context) for case in cases] == [(1, 70), (1, 96), (3, 70), (3, 96)]
    assert len(rounds) == len(cases) * (plan.rounds + 1)
    same_steps(cases, plan)
    for case in cases:
        assert case.transformers_native_ms is None  # the model is fp32
        assert (case.transformers_quantized_ms is None) == (bench.backend is None)


def test_a_context_as_long_as_the_window_leaves_room(tiny_runtime: ModelRuntime) -> None:
    plan = DecodePlan(contexts=(2048,), batches=(1,), steps=1, rounds=1)
    (case,) = DecodeBench(tiny_runtime).run(plan)
    assert case.context == 2048 - plan.generated


def test_a_context_beyond_the_window_is_refused() -> None:
    plan = DecodePlan(contexts=(2049,), batches=(1,), steps=1, rounds=1)
    with pytest.raises(ValueError, match=r"window of 2048.*--context"):
        plan.fit(2049, 2048)
    with pytest.raises(ValueError, match="window of 4"):
        plan.fit(2, 4)


def test_rows_of_a_batch_decode_what_one_row_decodes(tiny_runtime: ModelRuntime) -> None:
    """All rows join, have the same contents in memory of their own, and pass a block's end."""
    blocks = prefilled_blocks(tiny_runtime, 90, timeout_s=60, on_block=lambda index: None)
    histories = []
    for batch in (1, 3):
        decoder = PackedDecoder.copies_of(tiny_runtime, blocks, batch=batch, max_tokens=12)
        sequences = list(decoder._waiting)
        assert len(decoder.run(4)) == 4
        assert len(decoder.run(5)) == 5
        decoder.close()
        pool = decoder._cache.pool.view(batch, -1)
        assert all(torch.equal(pool[0, : blocks.pool.numel()], row[: blocks.pool.numel()]) for row in pool)
        counts = [sequence.history.num_output for sequence in sequences]
        # The token to begin with, the step in which the first row is alone, and nine of all.
        assert counts == [1 + 1 + 9] + [1 + 9] * (batch - 1)
        histories += [sequence.history.output for sequence in sequences]
    assert histories[0] == histories[1]
    assert all(history <= histories[0] for history in histories[2:])


def test_in_place_reads_the_blocks_themselves(tiny_runtime: ModelRuntime) -> None:
    blocks = random_blocks(tiny_runtime, 70, on_block=lambda index: None)
    decoder = PackedDecoder.in_place(tiny_runtime, blocks, max_tokens=8)
    assert decoder._cache.pool is blocks.pool
    assert len(decoder.run(2)) == 2
    decoder.close()
    with pytest.raises(ValueError, match="decode fewer"):
        PackedDecoder.in_place(tiny_runtime, blocks, max_tokens=26)


def test_an_engine_that_fails_is_reported(tiny_runtime: ModelRuntime) -> None:
    blocks = random_blocks(tiny_runtime, 70, on_block=lambda index: None)
    blocks.sinks.fill_(torch.nan)
    decoder = PackedDecoder.copies_of(tiny_runtime, blocks, batch=2, max_tokens=8)
    with pytest.raises(RuntimeError, match="not finite"):
        decoder.run(2)
    decoder.close()


def test_random_blocks_are_whole(tiny_runtime: ModelRuntime) -> None:
    seen: list[int] = []
    blocks = random_blocks(tiny_runtime, 70, on_block=seen.append)
    assert seen == [0, 1] and blocks.num_ready == 2 and blocks.tail_len == 6
    for index in range(2):  # raises for a block that is not sound
        tiny_runtime.layout.split_payload(torch.frombuffer(bytearray(blocks.payload(index)), dtype=torch.uint8), index)


def test_rows_of_transformers_have_memory_of_their_own(tiny_model: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(tiny_model("llama"))
    cache = dynamic_cache(config, batch=3, context=40, dtype=torch.bfloat16)
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 40
    keys = cache.layers[2].keys
    assert keys is not None and keys.shape == (3, 2, 40, 64) and keys.dtype == torch.bfloat16 and keys.is_contiguous()


def test_command(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "decode", "--model", str(tiny_model("llama")), "--context", "140", "--batch", "2"]
    arguments += ["--steps", "1", "--rounds", "2", "--preset", "kv3", "--threads", "2", "--json", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(path.read_text())
    (case,) = report["cases"]
    assert {"batch", "context", "kvferry_ms", "transformers_ms", "transformers_quantized_ms", "ratio"} <= set(case)
    for ratio, baseline in RATIOS.items():
        assert case[ratio] == pytest.approx(case[baseline] / case[baseline.replace("transformers", "kvferry")])
    environment = report["environment"]
    assert environment["preset"] == "kv3" and environment["threads"] == 2 and environment["load_before"] >= 0
    assert report["fill"] == "random"
    assert "random K and V" in " ".join(result.output.split())
    if quantized_backend() is None:
        assert case["transformers_quantized_ms"] is None and "pip install 'kvferry[eval]'" in result.output


def test_command_refuses(tiny_model: Callable[[str], Path]) -> None:
    model = str(tiny_model("llama"))
    result = CliRunner().invoke(app, ["bench", "decode", "--model", model, "--context", "4096"])
    assert result.exit_code == 1 and "do not fit the model's window of 2048" in result.output
    result = CliRunner().invoke(app, ["bench", "decode", "--model", model, "--preset", "kv9"])
    assert result.exit_code == 1 and "kv9" in result.output
