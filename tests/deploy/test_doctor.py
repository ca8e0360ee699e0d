"""`kvferry doctor`: what it says, and what it warns of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvferry.deploy import doctor
from kvferry.deploy.cli import app
from kvferry.kernels.cpu import native


@pytest.fixture(autouse=True)
def one_small_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LINEARS", ((64, 32),))


def found(topic: str) -> list[doctor.Finding]:
    return [finding for finding in doctor.examine() if finding.topic.startswith(topic)]


def test_json() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["warnings"] == sum(finding["warns"] for finding in report["findings"])
    topics = {finding["topic"] for finding in report["findings"]}
    assert {"machine", "CPU features", "threads", "load", "Triton", "dtype auto", "rows, float32"} <= topics
    assert {"rows, bfloat16", "torch", "transformers", "ray", "grpcio", "Redis server"} <= topics
    assert any(topic.startswith("kernels, cpu") for topic in topics)
    for finding in report["findings"]:
        assert set(finding) == {"topic", "value", "reason", "warns"}
        assert finding["reason"] or not finding["warns"], "a warning says why"


def test_screen() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and "kernels, cpu" in result.output


def test_slow_kernels_are_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    native._library.cache_clear()
    try:
        kernels = found("kernels, cpu")
    finally:
        native._library.cache_clear()
    assert kernels and all(finding.value == "reference" and finding.warns for finding in kernels)


def test_unsupported_head_dim_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HEAD_DIMS", (48,))
    (finding,) = found("kernels, cpu")
    assert finding.warns and "head_dim" in finding.reason


def test_fp32_and_changing_rows_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr(doctor, "linears_keep_rows", lambda linears, max_rows: False)
    (dtype,) = found("dtype auto")
    assert dtype.value == "float32" and dtype.warns
    assert all(finding.warns for finding in found("rows"))


def test_missing_redis_server_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_redis_server", lambda: None)
    (finding,) = found("Redis server")
    assert finding.value == "not found" and not finding.warns
