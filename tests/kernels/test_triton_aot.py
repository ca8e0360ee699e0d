"""Compiles the Triton kernels for GPUs that are not here and looks at the machine code.

Catches regressions: a spill, a fall back to scalar code. Says nothing about speed. One kernel of each kind is compiled
for sm_90, and decode's for gfx942. In the deep lane all are for sm_90; for sm_80 and gfx942 those of decode, the chunk
and the quantizer; for the other targets those of decode. The rest: `kvferry bench kernels --static`.
"""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import pytest

from kvferry.kernels.machine_code import MachineCode, compile_kernels

PLAIN = tuple(
    f"{kernel}-d{head_dim}"
    for kernel in ("packed", "packed16", "tail", "merge", "shares", "chunk", "quantize")
    for head_dim in (64, 128)
)
DECODE = ("packed-d64", "packed-d128")
KV2 = tuple(f"{kernel}-d{head_dim}-kv2" for kernel in ("packed", "chunk", "quantize") for head_dim in (64, 128))
ORDINARY = {
    "sm_90": (*(kernel for kernel in PLAIN if kernel.endswith("-d128")), "packed-d64", "packed-d128-kv2"),
    "gfx942": ("packed-d128",),
}
ALL = {
    "sm_90": (
        *PLAIN,
        *KV2,
        "list-d128-kv2",
        "boost-d128-kv2",
        "packed-d128-kv3",
        "packed-d128-kv4",
        "packed-d128-window",
        "packed-d80",
        "packed-d256",
        "chunk-d128-window",
        "chunk-d80",
        "chunk-d256",
    ),
    "gfx942": (*DECODE, *KV2),
    "sm_80": (*DECODE, "chunk-d128", "quantize-d128"),
    "sm_100": DECODE,
    "sm_120": DECODE,
    "sm_89": DECODE,
}
TARGETS = ALL if "KVFERRY_DEEP" in os.environ else ORDINARY
"""Kernels compiled for a target. kv2 and kv3 are presets."""
REGISTERS = {
    "packed": 168,
    "packed-d128-kv4": 240,
    "packed-d128-window": 192,
    "packed-d80": 224,
    "packed-d256": 255,
    "packed16": 255,
    "tail": 128,
    "merge": 64,
    "shares": 64,
    "chunk": 216,
    "chunk-d80": 232,
    "quantize": 168,
    "quantize-d64-kv2": 192,
    "quantize-d128-kv2": 216,
    "list": 80,
    "boost": 80,
}
"""Most registers a thread, of a kernel or of a family; 168 leave room for 12 warps a multiprocessor."""
AMD_REGISTERS = {
    "packed": 256,
    "chunk": 256,
    "quantize": 176,
}
"""Most vector registers: 256 leave room for 2 waves a SIMD."""
PRODUCTS = {
    "packed-d64": 18,
    "packed-d128": 34,
    "packed-d64-kv2": 22,
    "packed-d128-kv2": 42,
    "packed-d128-kv3": 34,
    "packed-d128-kv4": 36,
    "packed-d128-window": 34,
    "packed-d80": 32,
    "packed-d256": 66,
}
"""Tensor-core instructions a tile: K and V are 2 * 32 * D numbers, with 80 channels padded to 128, an instruction takes
16 x 16; and two for the value zero points, unless values are scaled one by one. Boosted channels take two for 16 of
them, or for fewer."""
PER_TOKEN_HEAD = {
    "packed-d64": 15.1,
    "packed-d128": 20.0,
    "packed-d64-kv2": 22.5,
    "packed-d128-kv2": 32.0,
    "packed-d128-kv3": 31.0,
    "packed-d128-kv4": 39.0,
    "packed-d128-window": 24.0,
    "packed-d80": 28.0,
    "packed-d256": 40.0,
}
OTHER_TARGETS = 1.05
"""Allowance for other targets than sm_90."""
BOUND = {"packed-d64": 0.95, "packed-d128": 0.95, "packed-d128-kv3": 0.95, "packed-d128-window": 0.95}
"""Least static bound on sm_90."""


class Built(NamedTuple):
    kernel: str
    target: str

    @property
    def family(self) -> str:
        return self.kernel.split("-")[0]


BUILT = [Built(kernel, target) for target, kernels in TARGETS.items() for kernel in kernels]
CUDA = [built for built in BUILT if built.target.startswith("sm_")]


def built_of(*families: str, among: list[Built]) -> list[Built]:
    return [built for built in among if built.family in families]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Built, MachineCode]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {"PYTHONWARNINGS": "error", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton-cache"))}

    def compile_targets(kernels: tuple[str, ...]) -> list[MachineCode]:
        targets = [target for target, wanted in TARGETS.items() if wanted == kernels]
        return compile_kernels(targets, names=kernels, environment=environment)

    with ThreadPoolExecutor(2) as pool:
        codes = chain.from_iterable(pool.map(compile_targets, dict.fromkeys(TARGETS.values())))
        return {Built(code.name, code.target): code for code in codes}


@pytest.mark.parametrize("built", BUILT, ids="-".join)
def test_nothing_is_spilled(compiled: dict[Built, MachineCode], built: Built) -> None:
    code = compiled[built]
    assert code.spills == 0
    limits = REGISTERS if built.target.startswith("sm_") else AMD_REGISTERS
    assert code.registers <= limits.get(built.kernel, limits[built.family])


@pytest.mark.parametrize("built", built_of("packed", "packed16", "tail", "chunk", among=BUILT), ids="-".join)
def test_attention_runs_on_tensor_cores(compiled: dict[Built, MachineCode], built: Built) -> None:
    assert compiled[built].count("HG?MMA|v_mfma_") >= 8


@pytest.mark.parametrize("built", built_of("packed", among=CUDA), ids="-".join)
def test_decode_keeps_every_product_on_tensor_cores(compiled: dict[Built, MachineCode], built: Built) -> None:
    assert compiled[built].count(r"HMMA\.16816\.F32$") == PRODUCTS[built.kernel]


@pytest.mark.parametrize("built", built_of("packed", "packed16", "chunk", among=CUDA), ids="-".join)
def test_codes_are_never_converted_one_by_one(compiled: dict[Built, MachineCode], built: Built) -> None:
    code = compiled[built]
    if built.kernel == "chunk-d80":
        pytest.skip("its longest loop is that over the unpacked chunk")
    assert code.unpack_asm >= 16
    assert code.count("LOP3") >= 16
    assert code.count("I2F") == 0


@pytest.mark.parametrize("built", built_of("packed", "packed16", among=CUDA), ids="-".join)
def test_pages_are_copied_asynchronously_16_bytes_at_a_time(compiled: dict[Built, MachineCode], built: Built) -> None:
    assert compiled[built].count(r"LDGSTS\..*128") >= 2


@pytest.mark.parametrize("built", built_of("packed", among=CUDA), ids="-".join)
def test_the_decode_loop_stays_short(compiled: dict[Built, MachineCode], built: Built) -> None:
    length = compiled[built].instructions_per_token_head
    assert length is not None
    assert length <= PER_TOKEN_HEAD[built.kernel] * (1.0 if built.target == "sm_90" else OTHER_TARGETS)


@pytest.mark.parametrize("kernel", [kernel for kernel in BOUND if kernel in TARGETS["sm_90"]])
def test_decode_is_bound_by_memory_on_paper(compiled: dict[Built, MachineCode], kernel: str) -> None:
    bound = compiled[Built(kernel, "sm_90")].static_bound
    assert bound is not None
    assert bound >= BOUND[kernel]
