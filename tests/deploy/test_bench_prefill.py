"""`kvferry bench prefill` on a tiny model: what it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from kvferry.deploy.cli import app


def test_cases(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "prefill.json"
    arguments = ["bench", "prefill", "--model", str(tiny_model("llama")), "--rounds", "1", "--json", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--tokens", "300", "--tokens", "20"])
    assert result.exit_code == 0, result.output
    cases = json.loads(out.read_text())["cases"]
    assert [(case["tokens"], case["transformers_dtype"]) for case in cases] == [
        (300, "fp32"),
        (300, "bf16"),
        (20, "fp32"),
        (20, "bf16"),
    ]
    for case in cases:
        assert case["kvferry_s"] > 0 and case["transformers_s"] > 0
        assert case["ratio"] == case["transformers_s"] / case["kvferry_s"]


def test_over_the_window(tiny_model: Callable[[str], Path]) -> None:
    result = CliRunner().invoke(app, ["bench", "prefill", "--model", str(tiny_model("llama")), "--tokens", "2048"])
    assert result.exit_code != 0
    assert "[2048] tokens do not fit the model's window of 2048 tokens" in result.output
