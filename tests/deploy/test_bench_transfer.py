"""`kvferry bench transfer` as a command: real namespaces and processes, a tiny model. Needs root."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvferry.deploy.bench_transfer_lab import check_rights, parse_link

ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("tc") is None, reason="network namespaces need root and iproute2"
)


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kvferry.deploy.cli", "bench", "transfer", *arguments]
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "src"))
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts() -> None:
    """A shell starts what it puts into the background with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def namespaces_of(pid: int) -> list[str]:
    shown = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=20, check=True).stdout
    return [line for line in shown.splitlines() if line.startswith(f"kvferry-{pid}-")]


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, timeout=20)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.deep
@needs_root
def test_a_short_run(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    out = tmp_path / "out.json"
    run = start("--model", str(tiny_model("llama")), "--link", "100mbit", "--tokens", "300", "--json", str(out))
    try:
        said, errors = run.communicate(timeout=280)
    finally:
        run.kill()
    assert run.returncode == 0, errors
    assert not namespaces_of(run.pid)
    cases = json.loads(out.read_text())["cases"]
    assert [(case["link"], case["path"], case["prompt_tokens"]) for case in cases] == [
        ("100mbit", "node", 300),
        ("100mbit", "redis", 300),
    ]
    for case in cases:
        assert not case["notes"]
        assert min(case["ttft_packed_s"], case["ttft_bf16_s"], case["ttft_recompute_s"], case["unstreamed_s"]) > 0
        assert 0 < case["fetch_packed_s"] < case["ttft_packed_s"]
        assert 0 < case["fetch_bf16_s"] < case["ttft_bf16_s"]
        assert case["exposed_s"] >= 0
        # 256 tokens of 3 layers, 2 heads, 64 channels, K and V, 2 bytes; headers and the way back come on top.
        assert case["wire_bytes_bf16"] > 256 * 3 * 2 * 64 * 2 * 2
        assert case["wire_bytes_packed"] < case["wire_bytes_bf16"] / 3
        assert case["path"] in said


@needs_root
def test_nothing_is_left_after_an_interrupt(tiny_model: Callable[[str], Path]) -> None:
    run = start("--model", str(tiny_model("llama")), "--link", "1gbit", "--tokens", "300", "--path", "node")
    try:
        deadline = time.monotonic() + 100
        while len(children_of(run.pid)) < 2 and time.monotonic() < deadline:  # a store node, and a model being loaded
            time.sleep(0.1)
        assert len(namespaces_of(run.pid)) == 2
        children = children_of(run.pid)
        assert len(children) == 2
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode != 0
    assert not namespaces_of(run.pid)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionError, match="needs root"):
        check_rights()


@pytest.mark.parametrize(
    ("text", "bits"), [("100mbit", 1e8), ("1gbit", 1e9), ("2.5gbit", 2.5e9), ("64kbit", 64e3), ("unshaped", None)]
)
def test_links(text: str, bits: float | None) -> None:
    assert parse_link(text) == bits


@pytest.mark.parametrize("text", ["", "fast", "0mbit", "-1gbit", "1gbit;reboot", "100"])
def test_a_bad_link_says_what_to_write(text: str) -> None:
    with pytest.raises(ValueError, match="100mbit"):
        parse_link(text)
