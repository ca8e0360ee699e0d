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
    f"{kernel}-d{head_dim}" for kernel in ("packed", "tail", "merge", "chunk", "quantize") for head_dim in (64, 128)
]
REGISTERS = {"packed": 255, "tail": 128, "merge": 64, "chunk": 216, "quantize": 168}
"""Most registers a thread. sm_80 gives a lone warp nearly all there are; sm_90 stays at 168."""
PER_TOKEN = {"packed-d128": 26.0, "packed-d64": 18.0}
"""Most instructions for each token of one KV head. Measured: 24.5 and 16.8."""


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
class TestMachineCode:
    def test_nothing_is_spilled(self, compiled: Any, kernel: str, arch: int) -> None:
        assert compiled[kernel, arch]["spills"] == 0

    def test_registers_are_bounded(self, compiled: Any, kernel: str, arch: int) -> None:
        assert compiled[kernel, arch]["registers"] <= REGISTERS[kernel.split("-")[0]]

    def test_attention_runs_on_tensor_cores(self, compiled: Any, kernel: str, arch: int) -> None:
        if kernel.startswith(("merge", "quantize")):
            pytest.skip("has no matrix product")
        assert compiled[kernel, arch]["tensor_core"] >= 8

    def test_codes_never_become_integers(self, compiled: Any, kernel: str, arch: int) -> None:
        if not kernel.startswith(("packed", "chunk")):
            pytest.skip("does not unpack")
        opcodes = compiled[kernel, arch]["opcodes"]
        assert opcodes["LOP3"] >= 32
        assert not [opcode for opcode in opcodes if opcode.startswith("I2F")]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", PER_TOKEN)
def test_the_decode_loop_stays_short(compiled: Any, kernel: str, arch: int) -> None:
    assert compiled[kernel, arch]["per_token"] <= PER_TOKEN[kernel]


def test_sm_90_keeps_room_for_twelve_warps(compiled: Any) -> None:
    for kernel in PER_TOKEN:
        assert compiled[kernel, 90]["registers"] <= 168
