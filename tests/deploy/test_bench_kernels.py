"""`kvferry bench kernels` on tiny shapes: what it reports, never how fast it was."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvferry.deploy import bench_kernels as module
from kvferry.deploy.bench_kernels import KernelBench, Shape, bench_kernels, plot_kernel_times, print_kernel_times
from kvferry.deploy.cli import app
from kvferry.kernels.cpu import NativeUnavailable, load

RATIOS = ("ratio_fp32", "ratio_bf16", "ratio_fp32_min", "ratio_bf16_min")


@pytest.fixture(scope="module")
def tiny() -> KernelBench:
    try:
        load()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shapes = (Shape(2, 3, 2, 64, 256),)
    try:
        return bench_kernels(
            rounds=2, decode=shapes, chunk=(Shape(1, 2, 3, 64, 256),), quantize=shapes, copy_bytes=2**20
        )
    finally:
        torch.set_num_threads(threads)


def by_op(bench: KernelBench) -> dict[str, Any]:
    return {case["op"]: case for case in json.loads(json.dumps(asdict(bench)))["cases"]}


def test_every_case_has_the_documented_fields(tiny: KernelBench) -> None:
    cases = by_op(tiny)
    assert set(cases) == {"decode_int8x2", "decode_int8", "chunk", "quantize"}
    for case in cases.values():
        assert set(case["shape"]) == {"B", "Hkv", "G", "D", "T"}
        assert case["backend"].startswith("cpu-")
        assert 0 < case["min_ms"] <= case["median_ms"]
        assert case["gb_per_s"] > 0 and case["share_of_copy"] > 0


def test_attention_is_right_and_has_baselines(tiny: KernelBench) -> None:
    for op, case in by_op(tiny).items():
        if op == "quantize":
            continue
        assert 0 < case["max_error"] < (0.2 if op == "decode_int8" else 1e-3), op
        assert all(case[ratio] > 0 for ratio in RATIOS)
        names = {baseline["name"] for baseline in case["baselines"]}
        assert {f"SDPA {d}, {way}" for d in ("fp32", "bf16") for way in ("rows", "enable_gqa")} <= names


def test_decode_bytes(tiny: KernelBench) -> None:
    """Pages of 24 D bytes; 4 sinks and 64 tokens of the tail in fp16."""
    expected = 2 * 3 * (8 * 24 * 64 + (4 + 64) * 2 * 64 * 2)
    assert by_op(tiny)["decode_int8x2"]["bytes_read"] == expected


def test_quantize_is_compared_with_the_reference(tiny: KernelBench) -> None:
    case = by_op(tiny)["quantize"]
    assert case["ratio_fp32"] is None and case["ratio_reference"] > 0
    assert case["bytes_equal"] > 0.999 and case["max_error"] < 1e-2
    assert case["bytes_read"] == 3 * 256 * 64 * 2 * 2
    assert case["fp32_gb_per_s"] == pytest.approx(2 * case["gb_per_s"])


def test_sdpa_baselines_compute_the_same_attention() -> None:
    """Rows with the mask, and enable_gqa, on the same K and V: one result."""
    try:
        kernels = load()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    for case in (
        module._decode_case(kernels, Shape(2, 2, 3, 64, 256), module.PLAIN),
        module._chunk_case(kernels, Shape(1, 2, 3, 64, 256), module.PLAIN),
    ):
        rows, gqa = (case.baselines[f"SDPA fp32, {way}"]().flatten() for way in ("rows", "enable_gqa"))
        torch.testing.assert_close(rows, gqa)


def test_print(tiny: KernelBench, capsys: pytest.CaptureFixture[str]) -> None:
    print_kernel_times(tiny)
    out = capsys.readouterr().out
    assert "decode_int8x2" in out and "load average" in out


def test_json_file(tiny: KernelBench, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(module, "bench_kernels", lambda **_: tiny)
    result = CliRunner().invoke(app, ["bench", "kernels", "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"]["copy_gb_per_s"] > 0 and len(written["cases"]) == len(tiny.cases)


def test_plot(tiny: KernelBench, tmp_path: Any) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(ValueError, match=r"kvferry\[bench\]"):
            plot_kernel_times(tiny, tmp_path / "out.png")
    else:
        plot_kernel_times(tiny, tmp_path / "out.png")
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_said_before_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "bench_kernels", lambda **_: pytest.fail("measured"))
    result = CliRunner().invoke(app, ["bench", "kernels", "--plot", str(tmp_path / "out.png")])
    assert result.exit_code == 1 and "kvferry[bench]" in result.output


def test_static(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The command hands targets on, prints, and writes the kernels; compiling is tested elsewhere."""

    @dataclass(frozen=True)
    class Compiled:
        name: str
        target: str

    stand_in = ModuleType("kvferry.deploy.bench_kernels_static")
    vars(stand_in).update(
        static_kernels=lambda targets: [Compiled("decode", target) for target in targets],
        print_static_kernels=lambda kernels: print(len(kernels), "kernels"),
    )
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    path = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["bench", "kernels", "--static", "--target", "sm_90", "--json", str(path)])
    assert result.exit_code == 0 and "1 kernels" in result.output
    assert json.loads(path.read_text()) == {"kernels": [{"name": "decode", "target": "sm_90"}]}
