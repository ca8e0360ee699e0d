"""`kvferry bench kernels`: the CPU kernels against torch's attention on unquantized K and V, in interleaved rounds.

A round calls every contender once, in the same order, because a shared machine's speed changes from second to second.
Only ratios within one case mean anything. SDPA is `F.scaled_dot_product_attention` called in its best way: the query
heads of a KV head as its rows ("rows"), so that K and V are read once; `enable_gqa` is timed beside it.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvferry.deploy.plotting import require_matplotlib
from kvferry.kernels.dispatch import select_kernels
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.packed import DecodeBatch, PackedKernels, PackedPrefix
from kvferry.kernels.reference import ReferenceKernels, dequantize_pages, quantize_pages
from kvferry.kernels.spec import KVQuantSpec

PLAIN = KVQuantSpec()
"""2 bits in groups of 32, fp16 scales: the format of the published figures."""
CHUNK = 128
"""Tokens of the prefill chunk."""
MEAN_TAIL = PLAIN.block_size // 2
"""fp16 tokens behind the packed ones in a decode case: what a sequence has on average."""
SLOW = ("reference", "enable_gqa")
SLOW_ROUNDS = 5
"""Baselines with these names' ends take part in so few rounds only: they take up to seconds."""
COPY_BYTES = 128 * 2**20
"""Several times the last-level cache."""

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sequences, KV heads, query heads a KV head, head dimension, packed tokens of context."""

    B: int
    Hkv: int
    G: int
    D: int
    T: int

    def __str__(self) -> str:
        return f"{self.B}, {self.Hkv}, {self.G}, {self.D}, {self.T:,}"


DECODE_SHAPES = (
    Shape(8, 8, 4, 128, 4096),
    Shape(1, 8, 4, 128, 32768),
    Shape(1, 3, 3, 64, 8192),
    Shape(1, 8, 4, 128, 8192),
    Shape(1, 8, 1, 128, 8192),
)
CHUNK_SHAPES = (Shape(1, 3, 3, 64, 8192), Shape(1, 8, 4, 128, 8192))
QUANTIZE_SHAPES = (Shape(1, 8, 1, 128, 8192), Shape(1, 3, 1, 64, 8192))


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contender in one case."""

    name: str
    median_ms: float
    min_ms: float
    rounds: int


@dataclass(frozen=True, kw_only=True)
class KernelTimes:
    """One kernel at one shape. Ratios are a baseline's time over the kernel's: above 1, the kernel is faster."""

    op: str
    backend: str
    shape: Shape
    median_ms: float
    min_ms: float
    rounds: int
    ratio_fp32: float | None
    """Median of SDPA in fp32, rows, over `median_ms`; None where SDPA is no baseline."""
    ratio_bf16: float | None
    ratio_fp32_min: float | None
    """The same of the fastest calls."""
    ratio_bf16_min: float | None
    ratio_reference: float | None
    """Median of the torch reference over `median_ms`; quantize only."""
    max_error: float
    """Largest error against the reference, over the reference's largest value."""
    bytes_equal: float | None
    """Quantize only: share of the bytes that are the reference's. Sums in another order turn a rare rounding."""
    bytes_read: int
    gb_per_s: float
    """`bytes_read` at the median time."""
    share_of_copy: float
    """`gb_per_s` over the machine's `copy_gb_per_s`."""
    fp32_gb_per_s: float | None
    """Quantize only: the input counted as if it were fp32, as other quantizers state it."""
    baselines: list[Times]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and under what load a run was made."""

    cpu: str
    cores: int
    threads: int
    torch: str
    load_before: float
    load_after: float
    copy_gb_per_s: float
    """Bytes read plus bytes written of a copy of 128 MiB, all threads, best of the run."""


@dataclass(frozen=True)
class KernelBench:
    machine: Machine
    cases: list[KernelTimes]


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What is timed: kernels by op, then their baselines by name."""

    shape: Shape
    kernels: dict[str, tuple[str, Call]]
    """By op: backend and call."""
    baselines: dict[str, Call]
    values: Callable[[Tensor], Tensor] = Tensor.float
    """The numbers that a result stands for."""
    expected: Call
    bytes_read: int


def bench_kernels(
    *,
    rounds: int,
    decode: Sequence[Shape] = DECODE_SHAPES,
    chunk: Sequence[Shape] = CHUNK_SHAPES,
    quantize: Sequence[Shape] = QUANTIZE_SHAPES,
    copy_bytes: int = COPY_BYTES,
    spec: KVQuantSpec = PLAIN,
    progress: Callable[[str], None] = lambda line: None,
) -> KernelBench:
    """Times the CPU kernels of this machine. Raises ValueError where none run: a reference is not worth timing."""
    load_before, copy = os.getloadavg()[0], _copy_gb_per_s(copy_bytes)
    makers = [(_decode_case, s) for s in decode] + [(_chunk_case, s) for s in chunk]
    makers += [(_quantize_case, s) for s in quantize]
    results = []
    with torch.inference_mode():
        for make, shape in makers:
            progress(f"{make.__name__.strip('_').removesuffix('_case')} {shape}")
            kernels = select_kernels(torch.device("cpu"), head_dim=shape.D, impl="cpu").kernels
            results += _measure(make(kernels, shape, spec), rounds, copy)
    machine = Machine(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        load_before=load_before,
        load_after=os.getloadavg()[0],
        copy_gb_per_s=copy,
    )
    return KernelBench(machine, results)


def cpu_name() -> str:
    """The processor as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_kernel_times(bench: KernelBench) -> None:
    machine = bench.machine
    table = Table(title="CPU kernels; times in ms, ratios: the baseline's time over the kernel's (median; best call)")
    for column in ("op", "B, Hkv, G, D, T", "median", "min", "SDPA fp32", "SDPA bf16", "reference", "GB/s", "error"):
        table.add_column(column, justify="left" if column in ("op", "B, Hkv, G, D, T") else "right")
    for case in bench.cases:
        table.add_row(
            case.op,
            str(case.shape),
            f"{case.median_ms:.3f}",
            f"{case.min_ms:.3f}",
            _ratios(case.ratio_fp32, case.ratio_fp32_min),
            _ratios(case.ratio_bf16, case.ratio_bf16_min),
            _ratios(case.ratio_reference, None),
            f"{case.gb_per_s:.1f} ({case.share_of_copy:.0%} of copy)",
            f"{case.max_error:.0e}" if case.max_error else "0",
        )
    console = Console(width=140)
    console.print(table)
    console.print(
        f"{machine.cpu}, {machine.threads} threads on {machine.cores} cores, torch {machine.torch}; "
        f"load average {machine.load_before:.1f} before, {machine.load_after:.1f} after; "
        f"a memory copy reads and writes {machine.copy_gb_per_s:.1f} GB/s"
    )
    if machine.load_before > machine.cores / 2:
        console.print("Warning: the machine is busy with something else; its ratios are noisier, and mostly lower.")


def plot_kernel_times(bench: KernelBench, path: Path) -> None:
    """Writes a bar chart of the ratios. Raises ValueError without matplotlib, or when `path` cannot be written."""
    require_matplotlib()
    from matplotlib.figure import Figure

    cases = [case for case in bench.cases if case.ratio_fp32 is not None]
    figure = Figure(figsize=(9, 1.5 + 0.6 * len(cases)), layout="constrained")
    axes = figure.subplots()
    places = range(len(cases))
    for name, offset, ratios in (
        ("SDPA fp32", -0.2, [case.ratio_fp32 or 0.0 for case in cases]),
        ("SDPA bf16", 0.2, [case.ratio_bf16 or 0.0 for case in cases]),
    ):
        bars = axes.barh([place + offset for place in places], ratios, height=0.38, label=f"over {name}")
        axes.bar_label(bars, fmt="%.1fx", padding=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(list(places), [f"{case.op}\n{case.shape}" for case in cases])
    axes.margins(x=0.08)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than torch's attention on unquantized K and V (median)")
    axes.set_title(f"{bench.machine.cpu}, {bench.machine.threads} threads, load {bench.machine.load_before:.1f}")
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write {path}: {error}") from error


def _decode_case(kernels: PackedKernels, shape: Shape, spec: KVQuantSpec) -> _Case:
    """One decode step of one layer: sinks, T packed tokens, half a block of fp16 tokens. SDPA reads the same tokens."""
    batch_size, heads, group, dim, packed = shape.B, shape.Hkv, shape.G, shape.D, shape.T
    keys, values = _random_kv(batch_size, heads, packed + MEAN_TAIL, dim)
    layout = _layout(heads, dim, spec)
    pool, blocks = _pool(kernels, layout, keys[:, :, :packed], values[:, :, :packed])
    sinks = (
        torch.stack([keys[:, :, : spec.sink_tokens], values[:, :, : spec.sink_tokens]], dim=2).unsqueeze(1).contiguous()
    )
    tails = torch.zeros(batch_size, 1, 2, heads, spec.block_size, dim, dtype=torch.float16)
    tails[:, 0, 0, :, :MEAN_TAIL], tails[:, 0, 1, :, :MEAN_TAIL] = keys[:, :, packed:], values[:, :, packed:]
    batch = DecodeBatch(
        layout=layout,
        pool=pool,
        sinks=sinks,
        tails=tails,
        block_tables=torch.arange(batch_size * blocks, dtype=torch.int32).view(batch_size, blocks),
        num_blocks=torch.full((batch_size,), blocks, dtype=torch.int32),
        slots=torch.arange(batch_size, dtype=torch.int32),
        tail_lens=torch.full((batch_size,), MEAN_TAIL, dtype=torch.int32),
    )
    query, scale = _random_query(batch_size, heads * group, dim), dim**-0.5
    rows = query.view(batch_size, heads, group, dim)
    sdpa = _Sdpa(keys, values)
    one_term = select_kernels(torch.device("cpu"), head_dim=dim, impl="cpu-int8").kernels

    def attention(by: PackedKernels) -> tuple[str, Call]:
        return by.name, lambda: by.decode_attention(query, batch, layer=0, scale=scale)

    return _Case(
        shape=shape,
        kernels={"decode_int8x2": attention(kernels), "decode_int8": attention(one_term)},
        baselines=sdpa.calls("rows", rows) | sdpa.calls("enable_gqa", query.unsqueeze(2), enable_gqa=True),
        expected=lambda: ReferenceKernels().decode_attention(query, batch, layer=0, scale=scale),
        bytes_read=pool.nbytes + sinks.nbytes + tails.nbytes // spec.block_size * MEAN_TAIL,
    )


def _chunk_case(kernels: PackedKernels, shape: Shape, spec: KVQuantSpec) -> _Case:
    """A prefill chunk over T packed tokens. SDPA gets the query heads of a KV head as rows, and a mask of two parts."""
    heads, group, dim, packed = shape.Hkv, shape.G, shape.D, shape.T
    keys, values = _random_kv(1, heads, packed + CHUNK, dim)
    layout = _layout(heads, dim, spec)
    pool, blocks = _pool(kernels, layout, keys[:, :, :packed], values[:, :, :packed])
    sinks = (
        torch.stack([keys[0, :, : spec.sink_tokens], values[0, :, : spec.sink_tokens]], dim=1).unsqueeze(0).contiguous()
    )
    prefix = PackedPrefix(layout=layout, pool=pool, table=torch.arange(blocks, dtype=torch.int32), sinks=sinks)
    own_keys, own_values = keys[0, :, packed:].contiguous(), values[0, :, packed:].contiguous()
    query, scale = _random_query(heads * group, CHUNK, dim), dim**-0.5
    rows = query.view(1, heads, group * CHUNK, dim)
    mask = torch.ones(CHUNK, packed + CHUNK, dtype=torch.bool).tril(packed).repeat(group, 1)
    sdpa = _Sdpa(keys, values)

    def run(by: PackedKernels = kernels) -> Tensor:
        return by.chunk_attention(query, own_keys, own_values, prefix, layer=0, scale=scale)

    return _Case(
        shape=shape,
        kernels={"chunk": (kernels.name, run)},
        baselines=sdpa.calls("rows", rows, attn_mask=mask)
        | sdpa.calls("rows, no mask", rows)
        | sdpa.calls("enable_gqa", query.unsqueeze(0), attn_mask=mask[:CHUNK], enable_gqa=True),
        expected=lambda: run(ReferenceKernels()),
        bytes_read=pool.nbytes + sinks.nbytes + own_keys.nbytes + own_values.nbytes,
    )


def _quantize_case(kernels: PackedKernels, shape: Shape, spec: KVQuantSpec) -> _Case:
    """K and V of T tokens of one layer, quantized with the fit and packed."""
    keys, values = (x[0] for x in _random_kv(1, shape.Hkv, shape.T, shape.D))
    page = _layout(shape.Hkv, shape.D, spec).layers[0].page
    out = torch.empty(shape.Hkv, shape.T // page.tokens, page.num_bytes, dtype=torch.uint8)

    def run() -> Tensor:
        kernels.quantize_block(keys, values, page, sink_tokens=spec.sink_tokens, out=out)
        return out

    def reference() -> Tensor:
        return quantize_pages(keys, values, page, sink_tokens=spec.sink_tokens)

    return _Case(
        shape=shape,
        kernels={"quantize": (kernels.name, run)},
        baselines={"reference": reference},
        values=lambda pages: torch.stack(dequantize_pages(pages, page)),
        expected=reference,
        bytes_read=keys.nbytes + values.nbytes,
    )


class _Sdpa:
    """torch's attention in fp32 and in bf16, on K and V already in that type."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._kv = {dtype: (keys.to(dtype), values.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}

    def calls(
        self, way: str, query: Tensor, *, attn_mask: Tensor | None = None, enable_gqa: bool = False
    ) -> dict[str, Call]:
        """`way` names how the query heads are arranged."""

        def call(dtype: torch.dtype) -> Call:
            q, (k, v) = query.to(dtype), self._kv[dtype]
            return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa)

        return {f"SDPA fp32, {way}": call(torch.float32), f"SDPA bf16, {way}": call(torch.bfloat16)}


def _random_kv(batch: int, heads: int, tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """fp16 [batch, heads, tokens, dim]; keys have channels of unequal strength, as real ones do."""
    generator = torch.Generator().manual_seed(0)
    strength = torch.rand(dim, generator=generator).mul(2).exp()
    keys = torch.randn(batch, heads, tokens, dim, generator=generator).mul_(strength).half()
    return keys, torch.randn(batch, heads, tokens, dim, generator=generator).half()


def _random_query(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _layout(heads: int, dim: int, spec: KVQuantSpec) -> BlockLayout:
    return BlockLayout(num_layers=1, num_kv_heads=heads, head_dim=dim, spec=spec)


def _pool(kernels: PackedKernels, layout: BlockLayout, keys: Tensor, values: Tensor) -> tuple[Tensor, int]:
    """K and V [batch, heads, T, D] in a pool, sequence after sequence, and the number of blocks of each."""
    batch, _, tokens, _ = keys.shape
    blocks = tokens // layout.block_size
    pool = torch.empty(batch * blocks, layout.block_bytes, dtype=torch.uint8)
    for index in range(batch * blocks):
        sequence, block = divmod(index, blocks)
        part = slice(block * layout.block_size, (block + 1) * layout.block_size)
        kernels.quantize_block(
            keys[sequence, :, part],
            values[sequence, :, part],
            layout.layers[0].page,
            sink_tokens=0 if block else layout.spec.sink_tokens,
            out=layout.layer_pages(pool[index], 0),
        )
    return pool, blocks


def _measure(case: _Case, rounds: int, copy_gb_per_s: float) -> list[KernelTimes]:
    contenders = {op: call for op, (_, call) in case.kernels.items()} | case.baselines
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()  # first calls allocate
    for index in range(rounds):
        for name, call in contenders.items():
            if name.endswith(SLOW) and index >= SLOW_ROUNDS:
                continue
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    times = {
        name: Times(name, 1000 * statistics.median(taken), 1000 * min(taken), len(taken))
        for name, taken in seconds.items()
    }
    expected = case.expected()
    return [
        _kernel_times(case, op, times, _differences(case, call(), expected), copy_gb_per_s)
        for op, (_, call) in case.kernels.items()
    ]


def _kernel_times(
    case: _Case, op: str, times: dict[str, Times], differences: tuple[float, float], copy_gb_per_s: float
) -> KernelTimes:
    own = times[op]
    fp32, bf16, reference = (times.get(name) for name in ("SDPA fp32, rows", "SDPA bf16, rows", "reference"))
    gb_per_s = case.bytes_read / own.median_ms / 1e6
    return KernelTimes(
        op=op,
        backend=case.kernels[op][0],
        shape=case.shape,
        median_ms=own.median_ms,
        min_ms=own.min_ms,
        rounds=own.rounds,
        ratio_fp32=fp32.median_ms / own.median_ms if fp32 else None,
        ratio_bf16=bf16.median_ms / own.median_ms if bf16 else None,
        ratio_fp32_min=fp32.min_ms / own.min_ms if fp32 else None,
        ratio_bf16_min=bf16.min_ms / own.min_ms if bf16 else None,
        ratio_reference=reference.median_ms / own.median_ms if reference else None,
        max_error=differences[0],
        bytes_equal=differences[1] if op == "quantize" else None,
        bytes_read=case.bytes_read,
        gb_per_s=gb_per_s,
        share_of_copy=gb_per_s / copy_gb_per_s,
        fp32_gb_per_s=2 * gb_per_s if op == "quantize" else None,
        baselines=[times[name] for name in case.baselines],
    )


def _differences(case: _Case, actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """(largest error over the largest expected value, share of equal elements)."""
    equal = float((actual == expected).float().mean())
    actual, expected = case.values(actual), case.values(expected)
    return float((actual - expected).abs().max() / expected.abs().max()), equal


def _copy_gb_per_s(size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(8):
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return 2 * size / best / 1e9


def _ratios(median: float | None, best: float | None) -> str:
    if median is None:
        return ""
    return f"{median:.2f}x" + ("" if best is None else f"; {best:.2f}x")
