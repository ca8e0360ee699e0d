"""Compiles the Triton kernels for GPUs that are not here, and reads what came out.

`python -m kvferry.kernels.triton_aot sm_90 gfx942 packed-d128` prints a `MachineCode` as JSON a line for these kernels,
or for all of them, on these targets; see `machine_code`. Triton's wheel brings ptxas, cuobjdump, nvdisasm and what HIP
needs.

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
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvferry.kernels import (
    triton_boosted_keys,
    triton_chunk,
    triton_decode,
    triton_launch,
    triton_packed,
    triton_quantize,
)
from kvferry.kernels.machine_code import (
    TARGETS,
    MachineCode,
    amd_opcodes,
    loop_passes,
    main_loop,
    sass_instructions,
)
from kvferry.kernels.page import PageFormat
from kvferry.kernels.presets import PRESETS
from kvferry.kernels.roofline import ASSUMED_DEVICES, static_bound
from kvferry.kernels.spec import PAGE, LayerSpec
from kvferry.kernels.triton_launch import Device
from kvferry.kernels.triton_page import page_shape

TOOLS = Path(nvidia.__file__).parent / "bin"


class KernelCase(NamedTuple):
    """One kernel with everything that its compilation depends on."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    """Triton's types of the pointers; other arguments are int32 but for the scale."""
    constants: dict[str, Any]
    options: dict[str, Any]
    tokens: int = 0
    """Tokens of one KV head that one pass of the main loop, or of a kernel without one, goes through; 0: others."""
    passes: int = 1
    """In one of how many passes the loop does what it does not do in each: a page's tiles."""
    num_bytes: int = 0
    """What such a pass reads and writes; 0 when arithmetic, not memory, is what it should be bound by."""


class Variant(NamedTuple):
    """What the kernels are compiled for."""

    head_dim: int
    group: int
    """Query heads a KV head."""
    spec: LayerSpec = LayerSpec()
    window: int = 0
    softcap: float = 0.0


VARIANTS = {
    "d128": Variant(128, 4),
    "d64": Variant(64, 3),
    "d128-kv3": Variant(128, 4, PRESETS["kv3"].layer),
    "d128-kv2": Variant(128, 4, PRESETS["kv2"].layer),
    "d64-kv2": Variant(64, 3, PRESETS["kv2"].layer),
    "d128-kv4": Variant(128, 4, PRESETS["kv4"].layer),
    "d128-window": Variant(128, 4, window=4096, softcap=50.0),
    "d80": Variant(80, 4),
    "d256": Variant(256, 4),
}
"""By what follows a kernel's name."""
BASIC = ("d128", "d64")
"""Those for which every kernel is compiled; for the others, what differs most: packed, chunk and quantize."""


def cases(target: str) -> Iterator[KernelCase]:
    """The kernels as launched for 8 KV heads and blocks of 128 tokens; `packed16`: 16 query heads a KV head."""
    device = Device("cuda", int(target.removeprefix("sm_"))) if target.startswith("sm_") else Device("hip", 0)
    for tag, (head_dim, group, spec, window, softcap) in VARIANTS.items():
        heads = dict(HEADS=8, GROUP=group)
        rule = dict(WINDOW=window, SOFTCAP=softcap)
        block = dict(BLOCK_TILES=4, SINKS=4)
        page = PageFormat(head_dim, spec)
        shape = page_shape(page)
        tile_bytes = page.num_bytes // shape.tiles
        views = dict(bytes_ptr="*u8", words_ptr="*i16", halves_ptr="*fp16")
        pool = dict(views, pairs_ptr="*i32", table_ptr="*i32")
        partial = dict(out_ptr="*fp32", lse_ptr="*fp32", num_blocks_ptr="*i32", tail_lens_ptr="*i32")
        for name, members, padded in ((f"packed-{tag}", group, device.narrow), (f"packed16-{tag}", 16, 16)):
            if members != group and tag not in BASIC:
                continue
            yield KernelCase(
                name,
                triton_packed.packed_attention_fwd_kernel,
                dict(query_ptr="*fp16", **pool, **partial),
                dict(heads, **block, **rule, GROUP=members, PADDED=padded, SHAPE=shape, ASM=device.asm),
                triton_launch.packed_options(device, shape, padded),
                PAGE,
                shape.tiles,
                tile_bytes,
            )
        yield KernelCase(
            f"chunk-{tag}",
            triton_chunk.chunk_attention_fwd_kernel,
            dict(pool, query_ptr="*fp16", key_ptr="*fp16", value_ptr="*fp16", sink_ptr="*fp16", out_ptr="*fp16"),
            dict(block, **rule, GROUP=group, SHAPE=shape, ASM=device.asm),
            triton_launch.chunk_options(device, 4 * triton_chunk.num_lanes(head_dim)),
            PAGE,
            shape.tiles,
        )
        # With a loop, over K, its instructions are not those of a page.
        has_loop = triton_quantize.fit_lanes(head_dim, spec.key.group_size) < head_dim // 4
        tokens = 0 if has_loop else page.tokens
        yield KernelCase(
            f"quantize-{tag}",
            triton_quantize.quantize_fwd_kernel,
            dict(views, key_ptr="*fp16", value_ptr="*fp16", flag_ptr="*i32"),
            dict(PAGES=128 // page.tokens, SHAPE=shape),
            triton_quantize.quantize_options(shape),
            tokens,
            num_bytes=0 if has_loop else tokens * 2 * head_dim * 2 + page.num_bytes,
        )
        if page.boosted:
            boost = dict(PAGES=128 // page.tokens, SHAPE=shape)
            for name, kernel, pointers in (
                (f"list-{tag}", triton_boosted_keys.list_boosted_fwd_kernel, dict(bytes_ptr="*u8")),
                (f"boost-{tag}", triton_boosted_keys.boost_fwd_kernel, views),
            ):
                pointers = dict(pointers, key_ptr="*fp16")
                yield KernelCase(name, kernel, pointers, boost, triton_quantize.BOOST_OPTIONS)
        if tag not in BASIC:
            continue
        yield KernelCase(
            f"tail-{tag}",
            triton_decode.tail_attention_fwd_kernel,
            dict(query_ptr="*fp16", tail_ptr="*fp16", sink_ptr="*fp16", slots_ptr="*i32", **partial),
            dict(heads, **rule, HEAD_DIM=head_dim, PADDED=device.narrow, TAIL_ROWS=128, SINKS=4),
            triton_launch.TAIL,
            triton_decode.TAIL_TILE.value,
            num_bytes=triton_decode.TAIL_TILE.value * 2 * head_dim * 2,
        )
        yield KernelCase(
            f"merge-{tag}",
            triton_decode.merge_fwd_kernel,
            dict(partial, part_ptr="*fp32", out_ptr="*fp16"),
            dict(heads, HEAD_DIM=head_dim, BLOCK_TILES=4, WINDOW=window, SHARE=0),
            triton_launch.MERGE,
        )
        yield KernelCase(
            f"shares-{tag}",
            triton_decode.merge_shares_fwd_kernel,
            dict(shares_ptr="*fp32", out_ptr="*fp32"),
            dict(HEAD_DIM=head_dim),
            triton_launch.MERGE,
        )


def compile_case(case: KernelCase, target: str) -> MachineCode:
    """Compiles for a target of `TARGETS`. Raises what Triton raises when the kernel does not compile."""
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
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    compiled = triton.compile(source, target=gpu, options=case.options)
    if target.startswith("sm_"):
        return read_cuda(case, target, compiled.asm["ptx"], compiled.asm["cubin"])
    return read_amd(case, target, compiled.asm["amdgcn"])


def read_cuda(case: KernelCase, target: str, ptx: str, cubin: bytes) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = sass_instructions(_tool("nvdisasm", "-c", file.name))
    loop = main_loop(code)
    looked_at = loop_passes(loop, case.passes) if loop else [instruction.opcode for instruction in code]
    tokens = case.passes * case.tokens
    warps = case.options["num_warps"]
    bound = None
    if case.num_bytes:
        bound = static_bound(looked_at, ASSUMED_DEVICES[target], warps=warps, num_bytes=case.passes * case.num_bytes)
    return MachineCode(
        name=case.name,
        target=target,
        registers=max(int(count) for count in re.findall(r"\bREG:(\d+)", usage)),
        spills=sum(instruction.opcode.startswith(("LDL", "STL")) for instruction in code),
        loop=len(loop),
        instructions_per_token_head=len(looked_at) * warps / tokens if tokens else None,
        static_bound=bound,
        unpack_asm=ptx.count("0x3C003C00"),
        opcodes=dict(Counter(opcode for _, opcode, _ in loop or code)),
    )


def read_amd(case: KernelCase, target: str, assembly: str) -> MachineCode:
    opcodes = amd_opcodes(assembly)
    (registers,) = re.findall(r"; TotalNumVgprs: (\d+)", assembly)
    (spilled,) = re.findall(r"\.vgpr_spill_count: +(\d+)", assembly)
    return MachineCode(
        name=case.name,
        target=target,
        registers=int(registers),
        spills=int(spilled) + sum(opcode.startswith("scratch_") for opcode in opcodes),
        loop=0,
        instructions_per_token_head=None,
        static_bound=None,
        unpack_asm=0,
        opcodes=dict(Counter(opcodes)),
    )


def _tool(name: str, *args: str) -> str:
    command = [str(TOOLS / name), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(arguments: list[str]) -> None:
    targets = [argument for argument in arguments if argument in TARGETS]
    names = [argument for argument in arguments if argument not in TARGETS]
    for target in targets:
        for case in cases(target):
            if not names or case.name in names:
                print(json.dumps(asdict(compile_case(case, target))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
