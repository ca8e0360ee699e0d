"""`kvferry bench memory` on a tiny model: real processes, counted by the operating system."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

import kvferry.deploy.benchmark.memory_run as memory_run
from kvferry.deploy.benchmark.memory_case import MemoryCase
from kvferry.deploy.benchmark.memory_run import MemoryPlan, Skipped, run_memory_plan
from kvferry.deploy.benchmark.resident_memory import peak_bytes, reset_peak, resident_bytes, return_freed_memory
from kvferry.deploy.benchmark.stretched_model import stretched_model
from kvferry.deploy.cli import app
from kvferry.deploy.models import find_model

MIB = 2**20


def plan_of(model: Path, **changes: object) -> MemoryPlan:
    plan: dict[str, object] = {
        "model": str(model),
        "presets": ("kv2",),
        "contexts": (512,),
        "fill": "random",
        "tokens": 2,
        "threads": 1,
        "stretch": True,
        "case_timeout_s": 120.0,
    }
    return MemoryPlan(**(plan | changes))  # type: ignore[arg-type]


def run(plan: MemoryPlan) -> list[MemoryCase | Skipped]:
    return list(run_memory_plan(plan, lambda label, done: None))


def test_peak_counts_from_the_reset_on() -> None:
    held = bytearray(64 * MIB)
    del held
    return_freed_memory()
    reset_peak()
    before = resident_bytes()
    assert peak_bytes() - before < 16 * MIB
    held = bytearray(b"x") * (64 * MIB)
    assert peak_bytes() - before > 60 * MIB
    del held


@pytest.mark.deep
def test_a_long_context_takes_what_the_layout_says(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """32,768 tokens in a window of 2,048: packed, at 16 bits, and in transformers, each in its own process."""
    context, path = 32_768, tmp_path / "out.json"
    arguments = ["bench", "memory", "--model", str(tiny_model("llama")), "--context", str(context), "--tokens", "2"]
    result = CliRunner().invoke(app, [*arguments, "--threads", "1", "--json", str(path)])
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    cases = {case["preset"]: case for case in report["cases"]}
    assert list(cases) == ["kv2", "kv16", "transformers"]
    wide = 3 * 2 * 64 * 2 * 2  # layers, heads, D, K and V, bytes
    for case in cases.values():
        assert (
            case["context"] == context
            and case["fill"] == "random"
            and case["ms_per_token"] > 0
            and case["cpu_ms_per_token"] > 0
        )
        assert case["bf16_bytes_per_token"] == wide
        # Resident memory grows by the cache, and by little else.
        grown = case["rss_filled_bytes"] - case["rss_before_bytes"]
        assert case["cache_bytes"] <= grown + MIB and grown < case["cache_bytes"] + 48 * MIB
        assert case["peak_rss_bytes"] >= case["rss_filled_bytes"]
    assert cases["kv2"]["packed_bytes_per_token"] < wide / 6
    assert cases["kv16"]["packed_bytes_per_token"] == cases["transformers"]["packed_bytes_per_token"] == wide
    # A packed step copies no cache; transformers copies a layer's to append to it.
    assert cases["kv2"]["step_scratch_bytes"] < cases["kv2"]["cache_bytes"] / 4
    assert cases["transformers"]["step_scratch_bytes"] > cases["transformers"]["cache_bytes"] / 3 / 4
    assert len(report["notes"]) == 2 and "stretched by YaRN" in " ".join(result.output.split())


def test_real_prefill(tiny_model: Callable[[str], Path]) -> None:
    (case,) = run(plan_of(tiny_model("llama"), fill="prefill", contexts=(300,)))
    assert isinstance(case, MemoryCase)
    assert case.fill == "prefill" and case.fill_seconds > 0 and case.context == 300


def test_a_context_beyond_the_window_is_refused_without_stretch(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"window of .*2048.*--stretch"):
        run(plan_of(tiny_model("llama"), contexts=(4096,), stretch=False))


def test_stretching_changes_the_configuration_only(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = find_model(str(tiny_model("llama")))
    assert stretched_model(source, 2048, tmp_path) is source
    stretched = stretched_model(source, 8192, tmp_path)
    config = AutoConfig.from_pretrained(stretched.path)
    assert config.max_position_embeddings == 8192
    assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["factor"] == 4.0
    assert (tmp_path / "model.safetensors").resolve() == (Path(source.path) / "model.safetensors").resolve()
    assert AutoConfig.from_pretrained(source.path).max_position_embeddings == 2048


def test_stretching_refuses_positions_that_are_scaled_already(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    once = tmp_path / "once"
    once.mkdir()
    source = stretched_model(find_model(str(tiny_model("llama"))), 8192, once)
    twice = tmp_path / "twice"
    twice.mkdir()
    with pytest.raises(ValueError, match="scales its positions already"):
        stretched_model(source, 16384, twice)


def test_what_does_not_fit_is_skipped_with_a_reason(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_run, "available_bytes", lambda: MIB)
    results = run(plan_of(tiny_model("llama")))
    assert [type(result) for result in results] == [Skipped, Skipped]
    assert all(isinstance(result, Skipped) and "GiB" in result.reason for result in results)


def test_a_process_past_its_time_is_ended_and_said(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(RuntimeError, match="time limit"):
        run(plan_of(tiny_model("llama"), case_timeout_s=0.2))


def test_the_process_says_what_is_wrong(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="decode fewer"):  # a tail of 100 of 128 tokens, and 60 more
        run(plan_of(tiny_model("llama"), contexts=(612,), tokens=60))


def test_command_refuses(tiny_model: Callable[[str], Path]) -> None:
    arguments = ["bench", "memory", "--model", str(tiny_model("llama")), "--context", "256"]
    result = CliRunner().invoke(app, [*arguments, "--fill", "zeros"])
    assert result.exit_code == 1 and "choose random or prefill" in result.output
    result = CliRunner().invoke(app, [*arguments, "--preset", "kv9"])
    assert result.exit_code == 1 and "kv9" in result.output
