"""Compiles every Triton kernel for GPUs that are not here and looks at the machine code.

Catches regressions: a spill, a fall back to scalar code. Says nothing about speed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ARCHS = (80, 90)
KERNELS = [
    f"{kernel}-d{head_dim}"
    for kernel in ("packed", "packed16", "tail", "merge", "chunk", "quantize")
    for head_dim in (64, 128)
]
REGISTERS = {"packed": 168, "packed16": 255, "tail": 128, "merge": 64, "chunk": 216, "quantize": 168}
"""Most registers a thread; 168 leave room for 12 warps a multiprocessor."""
PER_TOKEN = {"packed-d128": 26.0, "packed-d64": 18.0}
"""Most instructions for each token of one KV head. Measured: 25.3 and 16.8."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    """Machine code by kernel and target. In processes of their own: kernels may be interpreted in this one."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton-cache")),
        "TRITON_INTERPRET": "0",
    }
    compilers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "kvferry.kernels.triton_aot", "--json", str(arch)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arch in ARCHS
    ]
    found = {}
    for compiler in compilers:
        stdout, stderr = compiler.communicate()
        assert compiler.returncode == 0, stderr
        for code in map(json.loads, stdout.splitlines()):
            found[code["name"], code["arch"]] = code
    return found


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_spilled(compiled: Any, kernel: str, arch: int) -> None:
    code = compiled[kernel, arch]
    assert code["spills"] == 0
    assert code["registers"] <= REGISTERS[kernel.split("-")[0]]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.startswith(("packed", "tail", "chunk"))])
def test_attention_runs_on_tensor_cores(compiled: Any, kernel: str, arch: int) -> None:
    assert compiled[kernel, arch]["tensor_core"] >= 8


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.startswith(("packed", "chunk"))])
def test_codes_are_never_converted_one_by_one(compiled: Any, kernel: str, arch: int) -> None:
    code = compiled[kernel, arch]
    assert code["unpack_asm"] >= 16
    assert code["opcodes"]["LOP3"] >= 16
    assert not [opcode for opcode in code["opcodes"] if opcode.startswith("I2F")]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", PER_TOKEN)
def test_the_decode_loop_stays_short(compiled: Any, kernel: str, arch: int) -> None:
    assert compiled[kernel, arch]["per_token"] <= PER_TOKEN[kernel]
