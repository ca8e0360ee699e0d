"""`kvferry bench store` as a command: real processes, small records, one round."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.processes import redis_binary


def test_every_contender_moves_its_records(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "kvferry.deploy.cli", "bench", "store", "--rounds", "1", "--round-size", "100KB"]
    command += ["--record-size", "20KB", "--record-size", "1.2MB", "--redis-server", redis_binary(), "--json", str(out)]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    rates = report["rates"]
    assert {rate["record_bytes"] for rate in rates} == {20_000, 1_200_000}
    assert all(rate["mb_per_s"] > 0 and rate["ratio"] > 0 for rate in rates)
    names = {rate["name"] for rate in rates}
    assert {
        "plain TCP get",
        "node get: memory",
        "node get: memory, over TCP",
        "node get: disk",
        "node get: Redis",
        "node put_many: memory",
    } <= names
    assert "plain Unix socket get" in names or sys.platform != "linux"
    assert {rate["baseline"] for rate in rates} <= names
    for rate in rates:
        assert rate["name"] in done.stdout


def test_a_bad_size_is_one_line() -> None:
    command = [sys.executable, "-m", "kvferry.deploy.cli", "bench", "store", "--record-size", "big"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={"PYTHONPATH": "src"})
    assert done.returncode != 0 and "not a size" in done.stderr and "Traceback" not in done.stderr
