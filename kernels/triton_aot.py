"""Compiles the Triton kernels for an NVIDIA GPU without having one, and reads what came out.

`python -m kvferry.kernels.triton_aot 80 90` prints a line a kernel: registers, spills, tensor-core instructions and the
length of the main loop. The tests hold these to bounds. They catch regressions (a spill, a scalar path); they do not
say how fast a kernel is. Triton's wheel brings ptxas, cuobjdump and nvdisasm.

Needs a process without TRITON_INTERPRET: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvferry.kernels import triton_chunk, triton_decode, triton_quantize

TOOLS = Path(nvidia.__file__).parent / "bin"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")
LABEL = re.compile(r"\s*(\.L_x_\w+):")
TENSOR_CORE = re.compile(r"HG?MMA")


class KernelCase(NamedTuple):
    """One kernel with everything that its compilation depends on."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    """Triton's types of the pointers; other arguments are int32 but for the scale."""
    constants: dict[str, Any]
    options: dict[str, Any]
    page_tokens: int
    """Tokens that one iteration of the main loop reads, 0 when the loop is not over pages."""


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """What a compiled kernel is made of."""

    name: str
    arch: int
    registers: int
    spills: int
    """Local-memory loads and stores: LOCAL of cuobjdump stays 0 even when there are some."""
    tensor_core: int
    """Tensor-core instructions in the main loop."""
    loop: int
    """Instructions of the main loop: the one with most tensor-core instructions."""
    per_token: float
    """Instructions of the main loop for each token of one KV head, per thread group of 32."""
    unpack_asm: int
    """Inline unpackings in the PTX: 0 when the plain path was compiled."""
    opcodes: dict[str, int]
    """How often each opcode occurs in the main loop, or in the kernel without one; suffixes are cut off."""


def cases(arch: int) -> Iterator[KernelCase]:
    """The kernels as launched for 8 KV heads, shared by 4 query heads of 128 channels or 3 of 64; `packed16`: by 16."""
    for head_dim, group in ((128, 4), (64, 3)):
        heads = dict(HEADS=8, GROUP=group, HEAD_DIM=head_dim)
        tag = f"d{head_dim}"
        pool = dict(words_ptr="*i16", pairs_ptr="*i32", halves_ptr="*fp16", table_ptr="*i32")
        partial = dict(out_ptr="*fp32", lse_ptr="*fp32", num_blocks_ptr="*i32")
        for name, members, padded in ((f"packed-{tag}", group, 8), (f"packed16-{tag}", 16, 16)):
            yield KernelCase(
                name,
                triton_decode.packed_attention_fwd_kernel,
                dict(query_ptr="*fp16", **pool, **partial),
                dict(heads, GROUP=members, PADDED=padded, BLOCK_PAGES=4, SINKS=4, ASM=True),
                triton_decode.packed_options(padded, arch),
                32,
            )
        slots = dict(slots_ptr="*i32", tail_lens_ptr="*i32")
        yield KernelCase(
            f"tail-{tag}",
            triton_decode.tail_attention_fwd_kernel,
            dict(query_ptr="*fp16", tail_ptr="*fp16", sink_ptr="*fp16", **slots, **partial),
            dict(heads, PADDED=8, TAIL_ROWS=128, SINKS=4),
            triton_decode.TAIL_OPTIONS,
            0,
        )
        yield KernelCase(
            f"merge-{tag}",
            triton_decode.merge_fwd_kernel,
            dict(partial, part_ptr="*fp32", out_ptr="*fp16"),
            dict(heads, BLOCK_PAGES=4),
            triton_decode.MERGE_OPTIONS,
            0,
        )
        yield KernelCase(
            f"chunk-{tag}",
            triton_chunk.chunk_attention_fwd_kernel,
            dict(query_ptr="*fp16", key_ptr="*fp16", value_ptr="*fp16", **pool)
            | dict(sink_ptr="*fp16", out_ptr="*fp16"),
            dict(GROUP=group, HEAD_DIM=head_dim, BLOCK_PAGES=4, SINKS=4, ASM=True),
            triton_chunk.OPTIONS,
            32,
        )
        yield KernelCase(
            f"quantize-{tag}",
            triton_quantize.quantize_fwd_kernel,
            dict(key_ptr="*fp16", value_ptr="*fp16", bytes_ptr="*u8", words_ptr="*i16")
            | dict(halves_ptr="*fp16", flag_ptr="*i32"),
            dict(PAGES=4, HEAD_DIM=head_dim),
            triton_quantize.OPTIONS,
            0,
        )


def compile_case(case: KernelCase, arch: int) -> MachineCode:
    """Compiles for sm_<arch>. Raises what Triton raises when the kernel does not compile."""
    names: list[str] = case.kernel.arg_names
    signature = {}
    attrs = {}
    for index, name in enumerate(names):
        if name in case.constants:
            signature[name] = "constexpr"
        else:
            default = "fp32" if name == "scale_log2" else "i32"
            signature[name] = case.pointers.get(name, default)
        # What the launcher finds out about aligned tensors; without it no access is 16 bytes wide.
        if name.endswith("_ptr") or (name.endswith("_stride") and name != "table_stride"):
            attrs[(index,)] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    return read_code(case, arch, compiled.asm["ptx"], compiled.asm["cubin"])


def read_code(case: KernelCase, arch: int, ptx: str, cubin: bytes) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers = max(int(count) for count in re.findall(r"\bREG:(\d+)", usage))
    code = _instructions(sass)
    opcodes = [opcode for _, opcode, _ in code]
    loop = _main_loop(code)
    looked_at = loop or opcodes
    warps = case.options["num_warps"]
    return MachineCode(
        name=case.name,
        arch=arch,
        registers=registers,
        spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        tensor_core=_tensor_core(looked_at),
        loop=len(loop),
        per_token=len(loop) * warps / case.page_tokens if case.page_tokens else 0.0,
        unpack_asm=ptx.count("0x3C003C00"),
        opcodes=dict(Counter(opcode.split(".")[0] for opcode in looked_at)),
    )


def _tool(name: str, *args: str) -> str:
    command = [str(TOOLS / name), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _instructions(sass: str) -> list[tuple[int, str, int | None]]:
    """(address, opcode, address a branch goes to) of every instruction."""
    labels: dict[str, int] = {}
    pending: list[str] = []
    found: list[tuple[int, str, str]] = []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            pending.append(label[1])
        elif instruction := INSTRUCTION.search(line):
            address = int(instruction[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            found.append((address, instruction[2], instruction[3]))
    code = []
    for address, opcode, operands in found:
        target = re.search(r"\.L_x_\w+", operands) if opcode.startswith("BRA") else None
        code.append((address, opcode, labels.get(target[0]) if target else None))
    return code


def _tensor_core(opcodes: list[str]) -> int:
    return sum(bool(TENSOR_CORE.match(opcode)) for opcode in opcodes)


def _main_loop(code: list[tuple[int, str, int | None]]) -> list[str]:
    """Opcodes of the loop with the most tensor-core instructions; of those, the longest."""
    loops = [
        [opcode for at, opcode, _ in code if target <= at <= address]
        for address, _, target in code
        if target is not None and target < address
    ]
    return max(
        loops,
        key=lambda loop: (_tensor_core(loop), len(loop)),
        default=[],
    )


def main(arguments: list[str]) -> None:
    as_json = "--json" in arguments
    targets = [int(argument) for argument in arguments if argument.isdigit()] or [80, 90]
    for arch in targets:
        for case in cases(arch):
            code = compile_case(case, arch)
            if as_json:
                print(json.dumps(asdict(code)), flush=True)
            else:
                print(
                    f"sm_{code.arch} {code.name:13} registers {code.registers:3} spills {code.spills} "
                    f"tensor-core {code.tensor_core:3} loop {code.loop:4} per token {code.per_token:.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:])
