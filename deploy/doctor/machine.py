"""The processor, the kernels it would run and the numbers it computes; slow choices are warnings."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from kvferry.deploy.bench_kernels import cpu_name
from kvferry.deploy.doctor.finding import Finding, Status, gib
from kvferry.deploy.model_config import resolve_dtype
from kvferry.deploy.row_invariance import linears_keep_rows
from kvferry.kernels.dispatch import select_kernels

HEAD_DIMS = (64, 80, 96, 128, 256)
LINEARS = ((576, 192), (576, 1536), (1024, 3072))
"""Inputs and outputs: as in small models, and quick."""
ROWS = 48
CPU_FEATURES = ("avx2", "fma3", "f16c", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def machine_findings() -> Iterator[Finding]:
    """Takes seconds: matmuls are tried."""
    yield from _machine()
    yield from _kernels()
    yield from _numerics()


def _machine() -> Iterator[Finding]:
    cores, threads, load = len(os.sched_getaffinity(0)), torch.get_num_threads(), os.getloadavg()[0]
    yield Finding(
        "machine", f"{cpu_name()}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    )
    known = torch.cpu.get_capabilities()
    present = [name for name in CPU_FEATURES if known.get(name)]
    yield Finding("CPU features", " ".join(present) or "none of those that kernels use")
    yield Finding(
        "threads",
        f"torch uses {threads} on {cores} cores",
        "more threads than cores wait for each other: set threads" if threads > cores else "",
        _warns(threads > cores),
    )
    busy = load > cores
    yield Finding(
        "load",
        f"{load:.1f}",
        "more runs here than there are cores: a kernel waits for its slowest thread, and threads: 1 may be faster"
        if busy
        else "",
        _warns(busy),
    )


def _kernels() -> Iterator[Finding]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    else:
        yield Finding("GPU", "none", "torch sees no CUDA or HIP device; workers run on the CPU")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Finding(
            f"GPU {index}",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{gib(free)} of {gib(total)} free",
        )
    for device in devices:
        names: dict[tuple[str, str, bool], list[int]] = {}
        for head_dim in HEAD_DIMS:
            names.setdefault(_selected(device, head_dim), []).append(head_dim)
        for (name, reason, warns), dims in names.items():
            yield Finding(f"kernels, {device}, head_dim {', '.join(map(str, dims))}", name, reason, _warns(warns))
    triton = _version("triton")
    wanted = torch.cuda.is_available() and triton is None
    yield Finding(
        "Triton",
        triton or "not installed",
        "" if triton else "pip install 'kvferry[gpu]'; only a GPU needs it",
        _warns(wanted),
    )


def _selected(device: torch.device, head_dim: int) -> tuple[str, str, bool]:
    """(name, reason, whether that is slow or none)."""
    try:
        kernels, reason = select_kernels(device, head_dim=head_dim)
    except ValueError as error:
        return "none", str(error), True
    if device.type == "cuda":
        from kvferry.kernels.triton_kernels import HEAD_DIMS as TRITON_HEAD_DIMS

        if head_dim not in TRITON_HEAD_DIMS:
            return "none", f"the Triton kernels take head_dim {TRITON_HEAD_DIMS}", True
    # The reason names the head_dim, which the topic does already.
    return kernels.name, reason.replace(f"head_dim {head_dim} ", "head_dim "), kernels.name == "reference"


def _numerics() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype("auto", device)
    if device.type == "cuda":
        reason = "GPUs multiply it natively"
    elif dtype == torch.bfloat16:
        reason = "this CPU multiplies it natively"
    else:
        reason = "this CPU does not multiply bf16 natively; with fp32, fixed rows make a small batch's decode slower"
    yield Finding("dtype auto", _short(dtype), reason, _warns(dtype == torch.float32))
    for tried in (torch.float32, torch.bfloat16):
        keeps = linears_keep_rows(_linears(tried), max_rows=ROWS)
        yield Finding(
            f"rows, {_short(tried)}",
            "keep their bits" if keeps else "depend on their number",
            f"linear layers tried at the row counts of decode, up to {ROWS}"
            if keeps
            else "every decode step would run as many rows as a worker may have sequences",
            _warns(not keeps),
        )


def _linears(dtype: torch.dtype) -> list[torch.nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    linears = []
    for inputs, outputs in LINEARS:
        linear = torch.nn.Linear(inputs, outputs, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(outputs, inputs, generator=generator) * inputs**-0.5)
        linears.append(linear.to(dtype))
    return linears


def _warns(condition: bool) -> Status:
    return "warning" if condition else "ok"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
