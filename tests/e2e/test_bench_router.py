"""`kvferry bench router` with a tiny model: real processes, every policy, one round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvferry.deploy.cli import app
from kvferry.deploy.routing.policies import POLICIES


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvferry.deploy.cli", "bench", "router", *arguments]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2] / "src"))
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


@pytest.mark.deep
def test_every_policy_is_measured(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ("--documents", "2", "--requests", "6", "--document-len", "256", "--question-len", "8", "--rounds", "1")
    workers = ("--prefill-workers", "2", "--decode-workers", "1", "--worker-cache", "8MiB")
    speed = ("--request-rate", "20", "--link", "100mbit")
    done = _run("--model", str(tiny_model("llama")), *sizes, *workers, *speed, "--json", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["measured"] is True
    assert [row["policy"] for row in result["summary"]] == list(POLICIES)
    for row in result["rounds"]:
        assert len(row["ttfts_s"]) == sum(row["prefill_requests"]) == sum(row["decode_requests"]) == 6
        tokens = row["tokens"]
        assert tokens["total"] == 6 * (256 + 8)
        # Each document is computed once at least, and each question always.
        assert 2 * 256 + 6 * 8 <= tokens["computed"] <= tokens["total"]
        assert sum(tokens[name] for name in ("computed", "shared", "own_cache", "store")) == tokens["total"]
    assert "median TTFT of round-robin over prefix" in done.stdout


def test_mistakes_are_one_line() -> None:
    for options, message in (
        (("--policy", "sticky"), "no policy sticky"),
        (("--gateways", "2"), "go with --simulate"),
        (("--simulate", "--trace", "/nowhere.jsonl"), "nowhere.jsonl"),
    ):
        result = CliRunner().invoke(app, ["bench", "router", *options])
        assert result.exit_code != 0 and message in result.output and "Traceback" not in result.output
