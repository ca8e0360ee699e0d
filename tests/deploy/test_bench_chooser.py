"""`kvferry bench chooser` as a command: a tiny model, a real node, one round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvferry.deploy.cli", "bench", "chooser", *arguments]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2] / "src"))
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.deep
def test_every_case_is_measured(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ("--preset", "kv16", "--block-size", "32", "--blocks", "1", "--blocks", "2", "--rounds", "2")
    done = _run("--model", str(tiny_model("llama")), *sizes, "--dtype", "float32", "--json", str(out))
    assert done.returncode == 0, done.stderr
    cases = json.loads(out.read_text())["cases"]
    assert [(case["blocks"], case["mode"]) for case in cases] == [
        (blocks, mode) for blocks in (1, 2) for mode in ("measured", "always")
    ]
    assert all(case[name] > 0 for case in cases for name in ("off_s", "miss_s", "hit_s", "miss_ratio", "hit_ratio"))
    assert all(case["fetched"] == case["rounds"] == 2 for case in cases if case["mode"] == "always")
    assert "miss/off" in done.stdout


def test_a_prompt_over_the_window_is_one_line(tiny_model: Callable[[str], Path]) -> None:
    done = _run("--model", str(tiny_model("llama")), "--blocks", "100", "--rounds", "1")
    assert done.returncode != 0 and "do not fit the model's window" in done.stderr and "Traceback" not in done.stderr
