"""A deployment with two store nodes under Ray: one is killed and taken out while it serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.deep
def test_two_nodes_one_killed_and_taken_out(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    done = subprocess.run(
        [sys.executable, "-m", "support.ring_deployment", str(tiny_model("qwen3"))],
        capture_output=True,
        text=True,
        timeout=280,
        env=dict(os.environ, PYTHONPATH=f"{ROOT / 'src'}:{ROOT / 'tests'}", HOME=str(tmp_path), XDG_CACHE_HOME=cache),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["names"] == ["decode-0", "gateway", "prefill-0", "store-0", "store-1"]
    answers = result["answers"]
    assert all(answer["tokens"] == answers[0]["tokens"] for answer in answers)
    assert (answers[0]["cached"], answers[1]["cached"] > 0) == (0, True)
    assert answers[-1]["cached"] == answers[1]["cached"]  # all of it is on the node that is left
    num_blocks = answers[1]["cached"] // 32
    assert len(result["held"]) == 2
    assert sum(result["held"].values()) >= num_blocks
    assert min(result["held"].values()) > 0  # the control: both nodes were in use
    assert list(result["after"]) == list(result["held"])[:1]
    assert min(result["after"].values()) >= num_blocks
