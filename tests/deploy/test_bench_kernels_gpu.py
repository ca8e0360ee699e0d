"""The GPU bench: everything but the device and its clock runs here, on the CPU kernels; with a GPU, all of it."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from kvferry.deploy.bench_kernels import Shape
from kvferry.deploy.bench_kernels_gpu import CudaTimer, WallTimer, bench_gpu_kernels, print_gpu_times
from kvferry.kernels.cpu import load
from kvferry.kernels.presets import PRESETS

SMALL = (Shape(2, 2, 3, 64, 256), Shape(1, 2, 4, 128, 384))


@pytest.mark.parametrize("preset", ["kv2", "kv4", "kv16"])
def test_on_the_cpu_kernels(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    bench = bench_gpu_kernels(
        load(), torch.device("cpu"), WallTimer(), rounds=2, shapes=SMALL, spec=PRESETS[preset], copy_bytes=2**20
    )
    assert [case.shape for case in bench.cases] == list(SMALL)
    for case in bench.cases:
        assert case.op == "decode" and case.max_error < 5e-3
        assert case.min_ms <= case.median_ms and case.ratio_fp16 > 0 and case.ratio_fp16_gqa > 0
        assert case.gb_per_s == pytest.approx(case.bytes_read / case.median_ms / 1e6)
    assert {"op", "backend", "shape", "median_ms", "ratio_fp32", "ratio_bf16", "max_error"} <= asdict(
        bench.cases[0]
    ).keys()
    json.dumps(asdict(bench))
    print_gpu_times(bench)
    assert "2, 2, 3, 64, 256" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    from kvferry.kernels.triton_kernels import TritonKernels

    bench = bench_gpu_kernels(
        TritonKernels(), torch.device("cuda"), CudaTimer(), rounds=3, shapes=SMALL, copy_bytes=2**24
    )
    assert all(case.max_error < 5e-3 for case in bench.cases)
