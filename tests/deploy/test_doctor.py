"""`kvferry doctor`: what it says, and what it warns of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from kvferry.deploy.cli import app
from kvferry.deploy.doctor import machine as doctor
from kvferry.deploy.doctor import software
from kvferry.deploy.doctor.finding import Finding
from kvferry.kernels.cpu import native


@pytest.fixture(autouse=True)
def one_small_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LINEARS", ((64, 32),))


def found(topic: str) -> list[Finding]:
    return [finding for finding in doctor.machine_findings() if finding.topic.startswith(topic)]


def test_json() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.output)
    assert result.exit_code == (1 if report["problems"] else 0)
    for name in ("warning", "problem"):
        assert report[f"{name}s"] == sum(finding["status"] == name for finding in report["findings"])
    topics = {finding["topic"] for finding in report["findings"]}
    assert {"machine", "CPU features", "threads", "load", "Triton", "dtype auto", "rows, float32"} <= topics
    assert {"rows, bfloat16", "torch", "transformers", "ray", "grpcio", "Redis server", "Python"} <= topics
    assert {"settings", "model demo", "KV capacity", "open files", "memory", "shared memory", "clock"} <= topics
    assert any(topic.startswith("kernels, cpu") for topic in topics)
    for finding in report["findings"]:
        assert set(finding) == {"topic", "value", "reason", "status"}
        assert finding["reason"] or finding["status"] == "ok", "a warning says what to do"


def test_screen() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert "kernels, cpu" in result.output and "KV capacity" in result.output


def test_slow_kernels_are_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    native._library.cache_clear()
    try:
        kernels = found("kernels, cpu")
    finally:
        native._library.cache_clear()
    assert kernels and all(finding.value == "reference" and finding.status == "warning" for finding in kernels)


def test_unsupported_head_dim_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HEAD_DIMS", (48,))
    (finding,) = found("kernels, cpu")
    assert finding.status == "warning" and "head_dim" in finding.reason


def test_fp32_and_changing_rows_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr(doctor, "linears_keep_rows", lambda linears, max_rows: False)
    (dtype,) = found("dtype auto")
    assert dtype.value == "float32" and dtype.status == "warning"
    assert all(finding.status == "warning" for finding in found("rows"))


def test_missing_redis_server_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "redis_server", lambda: None)
    (finding,) = [finding for finding in software.software_findings() if finding.topic == "Redis server"]
    assert finding.value == "not found" and finding.status == "ok"


@pytest.mark.parametrize(
    ("requirement", "version", "status"),
    [
        ("torch>=2.11", "2.13.0+cpu", "ok"),
        ("torch>=2.11", "2.3.0", "problem"),
        ("ray>=2.60,<3", "3.0.0", "problem"),
        ("ray>=2.60,<3", None, "problem"),
    ],
)
def test_versions_against_their_ranges(requirement: str, version: str | None, status: str) -> None:
    finding = software.check_library(Requirement(requirement), version)
    assert finding.status == status
    assert status == "ok" or "pip install" in finding.reason


def test_python_against_its_range() -> None:
    assert software.check_python("3.10.2", SpecifierSet(">=3.11")).status == "problem"
    assert software.check_python("3.11.7", SpecifierSet(">=3.11")).status == "ok"
