"""`kvferry bench kernels` on a GPU: packed decode attention against torch's on fp16 K and V, timed by CUDA events.

Baselines are `F.scaled_dot_product_attention` in fp16, which picks FlashAttention where it can: with the query heads of
a KV head as rows, and with `enable_gqa`. A round calls every contender once, in the same order.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvferry.deploy.bench_kernels import MEAN_TAIL, PLAIN, Shape
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.packed import DecodeBatch, PackedKernels
from kvferry.kernels.reference import ReferenceKernels
from kvferry.kernels.spec import KVQuantSpec

SHAPES = (
    Shape(1, 8, 4, 128, 131_072),
    Shape(8, 8, 4, 128, 32_768),
    Shape(8, 8, 4, 128, 4_096),
    Shape(1, 3, 3, 64, 131_072),
)
COPY_BYTES = 2**30
WARM_UPS = 3
"""Calls before the first round: the first one compiles."""

Call = Callable[[], Tensor]


class Timer(Protocol):
    """Milliseconds of one call, from its first kernel to its last."""

    def __call__(self, call: Call, /) -> float: ...


class CudaTimer:
    """By two events on the current stream."""

    def __call__(self, call: Call, /) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


class WallTimer:
    """For devices that compute before they return: a CPU."""

    def __call__(self, call: Call, /) -> float:
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1000


@dataclass(frozen=True, kw_only=True)
class GpuTimes:
    """Packed decode attention at one shape. Ratios are a baseline's median over the kernel's: above 1, it is faster."""

    op: str
    backend: str
    shape: Shape
    median_ms: float
    min_ms: float
    ratio_fp16: float
    """SDPA, query heads as rows."""
    ratio_fp16_gqa: float
    """SDPA with `enable_gqa`."""
    ratio_fp32: None = None
    ratio_bf16: None = None
    max_error: float
    """Largest error against the reference, over the reference's largest value."""
    bytes_read: int
    gb_per_s: float
    share_of_copy: float
    """`gb_per_s` over what a copy on the device reads and writes."""


@dataclass(frozen=True, kw_only=True)
class GpuBench:
    device: str
    torch: str
    copy_gb_per_s: float
    cases: list[GpuTimes]


def bench_gpu_kernels(
    kernels: PackedKernels,
    device: torch.device,
    timer: Timer,
    *,
    rounds: int,
    shapes: Sequence[Shape] = SHAPES,
    spec: KVQuantSpec = PLAIN,
    copy_bytes: int = COPY_BYTES,
    progress: Callable[[str], None] = lambda line: None,
) -> GpuBench:
    """Times `kernels` on `device`. Raises torch's out-of-memory error where a shape does not fit."""
    with torch.inference_mode():
        copy = _copy_gb_per_s(device, timer, copy_bytes)
        cases = []
        for shape in shapes:
            progress(f"decode {shape}")
            cases.append(_measure(kernels, device, timer, shape, spec, rounds, copy))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return GpuBench(device=name, torch=torch.__version__, copy_gb_per_s=copy, cases=cases)


def print_gpu_times(bench: GpuBench) -> None:
    table = Table(title="Triton kernels; times in ms, ratios: the baseline's median over the kernel's")
    for column in ("op", "B, Hkv, G, D, T", "median", "min", "SDPA fp16", "enable_gqa", "GB/s", "error"):
        table.add_column(column, justify="left" if column in ("op", "B, Hkv, G, D, T") else "right")
    for case in bench.cases:
        table.add_row(
            case.op,
            str(case.shape),
            f"{case.median_ms:.3f}",
            f"{case.min_ms:.3f}",
            f"{case.ratio_fp16:.2f}x",
            f"{case.ratio_fp16_gqa:.2f}x",
            f"{case.gb_per_s:.0f} ({case.share_of_copy:.0%} of copy)",
            f"{case.max_error:.0e}",
        )
    console = Console(width=140)
    console.print(table)
    console.print(f"{bench.device}, torch {bench.torch}; a copy reads and writes {bench.copy_gb_per_s:.0f} GB/s")


def _measure(
    kernels: PackedKernels,
    device: torch.device,
    timer: Timer,
    shape: Shape,
    spec: KVQuantSpec,
    rounds: int,
    copy_gb_per_s: float,
) -> GpuTimes:
    batch, keys, values = _batch(kernels, device, shape, spec)
    generator = torch.Generator(device).manual_seed(1)
    heads = shape.Hkv * shape.G
    query = torch.randn(shape.B, heads, shape.D, generator=generator, device=device, dtype=torch.float16)
    rows, scale = query.view(shape.B, shape.Hkv, shape.G, shape.D), shape.D**-0.5

    def packed() -> Tensor:
        return kernels.decode_attention(query, batch, layer=0, scale=scale)

    calls: dict[str, Call] = {
        "packed": packed,
        "rows": lambda: F.scaled_dot_product_attention(rows, keys, values),
        "gqa": lambda: F.scaled_dot_product_attention(query.unsqueeze(2), keys, values, enable_gqa=True),
    }
    for call in calls.values():
        for _ in range(WARM_UPS):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timer(call))
    expected = ReferenceKernels().decode_attention(query.float(), batch, layer=0, scale=scale)
    error = (packed().float() - expected).abs().max() / expected.abs().max()
    median = {name: statistics.median(values) for name, values in times.items()}
    bytes_read = batch.pool.nbytes + batch.sinks.nbytes + batch.tails.nbytes // spec.block_size * MEAN_TAIL
    gb_per_s = bytes_read / median["packed"] / 1e6
    return GpuTimes(
        op="decode",
        backend=kernels.name,
        shape=shape,
        median_ms=median["packed"],
        min_ms=min(times["packed"]),
        ratio_fp16=median["rows"] / median["packed"],
        ratio_fp16_gqa=median["gqa"] / median["packed"],
        max_error=float(error),
        bytes_read=bytes_read,
        gb_per_s=gb_per_s,
        share_of_copy=gb_per_s / copy_gb_per_s,
    )


def _batch(
    kernels: PackedKernels, device: torch.device, shape: Shape, spec: KVQuantSpec
) -> tuple[DecodeBatch, Tensor, Tensor]:
    """A batch of one layer with random K and V, and the same K and V in fp16 [B, Hkv, T + tail, D]."""
    size, blocks = spec.block_size, shape.T // spec.block_size
    generator = torch.Generator(device).manual_seed(0)
    kv = torch.randn(
        2, shape.B, shape.Hkv, shape.T + MEAN_TAIL, shape.D, generator=generator, device=device, dtype=torch.float16
    )
    keys, values = kv[0], kv[1]
    layout = BlockLayout(num_layers=1, num_kv_heads=shape.Hkv, head_dim=shape.D, spec=spec)
    pool = torch.empty(shape.B * blocks, layout.block_bytes, dtype=torch.uint8, device=device)
    for row in range(shape.B):
        for index in range(blocks):
            share = slice(index * size, (index + 1) * size)
            kernels.quantize_block(
                keys[row, :, share].contiguous(),
                values[row, :, share].contiguous(),
                layout.layers[0].page,
                sink_tokens=spec.sink_tokens if index == 0 else 0,
                out=layout.layer_pages(pool[row * blocks + index], 0),
            )
    first = slice(spec.sink_tokens)
    sinks = torch.stack([keys[:, :, first], values[:, :, first]], dim=2).unsqueeze(1).contiguous()
    tails = torch.zeros(shape.B, *layout.tail_shape, dtype=torch.float16, device=device)
    tails[:, 0, :, :, :MEAN_TAIL] = kv[:, :, :, shape.T :].transpose(0, 1)

    def ints(values: Tensor) -> Tensor:
        return values.to(device=device, dtype=torch.int32)

    return (
        DecodeBatch(
            layout=layout,
            pool=pool,
            sinks=sinks,
            tails=tails,
            block_tables=ints(torch.arange(shape.B * blocks).view(shape.B, blocks)),
            num_blocks=ints(torch.full((shape.B,), blocks)),
            slots=ints(torch.arange(shape.B)),
            tail_lens=ints(torch.full((shape.B,), MEAN_TAIL)),
        ),
        keys,
        values,
    )


def _copy_gb_per_s(device: torch.device, timer: Timer, num_bytes: int) -> float:
    """Bytes read plus bytes written of a copy on the device, best of a few."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(timer(lambda: target.copy_(source)) for _ in range(8))
    return 2 * num_bytes / best / 1e6
