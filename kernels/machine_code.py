"""What a compiled Triton kernel is made of, read from its disassembly. Needs neither Triton nor a GPU.

`compile_kernels` has `triton_aot` compile in processes of their own, because a process that interprets kernels cannot.
Figures catch regressions (a spill, a fall back to scalar code). They do not say how fast a kernel is.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
"""What the kernels are compiled for without having it."""
SASS_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")
SASS_LABEL = re.compile(r"\s*(\.L_x_\w+):")
AMD_INSTRUCTION = re.compile(r"\s+((?:v|s|buffer|global|flat|scratch|ds)_\w+)")
SASS_LABEL_USE = re.compile(r"\.L_x_\w+")
TENSOR_CORE = re.compile(r"HG?MMA|UTCHMMA|v_mfma_")


class Instruction(NamedTuple):
    address: int
    opcode: str
    target: int | None
    """Address that a branch goes to."""


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """One kernel on one target."""

    name: str
    target: str
    """sm_<arch>, or gfx<arch>"""
    registers: int
    """A thread: of cuobjdump, or vector registers of the AMD assembly."""
    spills: int
    """Local-memory loads and stores in the whole kernel. LOCAL of cuobjdump stays 0 even when there are some."""
    loop: int
    """Instructions of the main loop; 0 without one, and for AMD."""
    instructions_per_token_head: float | None
    """Instructions of all warps for each token of one KV head; None when that is not what the kernel goes through, and
    for AMD."""
    static_bound: float | None
    """`roofline.static_bound`; None for a kernel that is not bound by memory, and for AMD."""
    unpack_asm: int
    """Inline unpackings in the PTX: 0 when the plain path was compiled."""
    opcodes: dict[str, int]
    """How often each opcode, with its suffixes, occurs in the main loop, or in a kernel without one and on AMD."""

    def count(self, pattern: str) -> int:
        """Instructions whose opcode begins with the regular expression."""
        return sum(number for opcode, number in self.opcodes.items() if re.match(pattern, opcode))


def sass_instructions(listing: str) -> list[Instruction]:
    """Instructions of an `nvdisasm -c` listing."""
    labels: dict[str, int] = {}
    pending: list[str] = []
    found: list[tuple[int, str, str]] = []
    for line in listing.splitlines():
        if label := SASS_LABEL.match(line):
            pending.append(label[1])
        elif instruction := SASS_INSTRUCTION.search(line):
            address = int(instruction[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            found.append((address, instruction[2], instruction[3]))
    code = []
    for address, opcode, operands in found:
        used = SASS_LABEL_USE.search(operands) if opcode.startswith("BRA") else None
        code.append(Instruction(address, opcode, labels.get(used[0]) if used else None))
    return code


def amd_opcodes(assembly: str) -> list[str]:
    """Opcodes of Triton's `amdgcn` text: of the whole kernel, whose loops LLVM lays out in several pieces."""
    return [found[1] for line in assembly.splitlines() if (found := AMD_INSTRUCTION.match(line))]


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The loop with the most tensor-core instructions; of those, the longest."""
    loops = [
        [instruction for instruction in code if target <= instruction.address <= address]
        for address, _, target in code
        if target is not None and target < address
    ]
    return max(loops, key=lambda loop: (tensor_core(opcode for _, opcode, _ in loop), len(loop)), default=[])


def loop_passes(loop: Sequence[Instruction], passes: int) -> list[str]:
    """Opcodes of so many passes through a loop, in one of which no branch skips a part of it."""
    skips = [(address, target) for address, _, target in loop if target is not None and target > address]
    inside = {address for address, _, _ in loop}
    common: list[str] = []
    skipped: list[str] = []
    for at, opcode, _ in loop:
        is_skipped = any(address < at < target for address, target in skips if target in inside)
        (skipped if is_skipped else common).append(opcode)
    return common * passes + skipped


def tensor_core(opcodes: Iterable[str]) -> int:
    return sum(bool(TENSOR_CORE.match(opcode)) for opcode in opcodes)


def compile_kernels(
    targets: Sequence[str],
    *,
    names: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> list[MachineCode]:
    """Compiles kernels, all or those of `names`, for targets of `TARGETS`, in one process.

    `environment` is added to this process's. Seconds a kernel and target, unless Triton has it cached. Raises
    ValueError for an unknown target and RuntimeError, with the compiler's message, when a kernel does not compile or
    Triton is not installed.
    """
    if unknown := [target for target in targets if target not in TARGETS]:
        raise ValueError(f"unknown targets {', '.join(unknown)}: the kernels are compiled for {', '.join(TARGETS)}")
    command = [sys.executable, "-m", "kvferry.kernels.triton_aot", *targets, *names]
    done = subprocess.run(
        command,
        env={**os.environ, **(environment or {}), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the kernels did not compile:\n{done.stderr}")
    return [MachineCode(**json.loads(line)) for line in done.stdout.splitlines()]
