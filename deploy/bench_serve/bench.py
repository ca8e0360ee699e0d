"""A whole run: ask the gateway, make the workload, send it, report."""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvferry.deploy.bench_serve.arrivals import arrival_times
from kvferry.deploy.bench_serve.metrics import Slo, summarize
from kvferry.deploy.bench_serve.mixed import Mix, mixed_requests
from kvferry.deploy.bench_serve.plots import draw_plots
from kvferry.deploy.bench_serve.pool_usage import PoolUsage, watch_pools
from kvferry.deploy.bench_serve.preflight import check_vocabulary, check_window, find_model
from kvferry.deploy.bench_serve.report import as_json, details, print_summary, write_json
from kvferry.deploy.bench_serve.run import Run, run
from kvferry.deploy.bench_serve.trace import BLOCK_TOKENS, read_trace, replay
from kvferry.deploy.bench_serve.workload import (
    DEFAULT_VOCAB_SIZE,
    Stream,
    TokenSource,
    Workload,
    shared_prefixes,
    unique_prompts,
)
from kvferry.deploy.client import AsyncClient, ClientAccess
from kvferry.proto import inference_pb2_grpc
from kvferry.proto.peer_security import PeerSecurity

WORKLOADS = ("unique", "shared-prefix", "trace", "mixed")
DEFAULT_NUM_PROMPTS = 100


@dataclass(frozen=True, kw_only=True)
class ServeBench:
    """What the options of `kvferry bench serve` say. Raises ValueError when they do not fit together."""

    address: str
    access: ClientAccess = field(default_factory=ClientAccess)  # what the gateway asks for
    peers: PeerSecurity = field(default_factory=PeerSecurity)  # what `workers` ask for
    model: str | None = None
    workload: str = "unique"
    num_prompts: int | None = None  # None: 100, or the whole trace
    seed: int = 0
    request_rate: float = math.inf  # requests a second
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 0
    input_len: int = 512
    output_len: int = 64
    range_ratio: float = 0.0
    prefix_len: int = 1024
    num_prefixes: int = 4
    suffix_len: int = 64
    trace: Path | None = None
    trace_speed: float = 1.0
    trace_block: int = BLOCK_TOKENS
    long_input_len: int = 2048
    mix: Mix = field(default_factory=Mix)
    short_deadline_s: float = 0.05
    slo: Slo = field(default_factory=Slo)
    timeout_s: float = 600.0
    vocab_size: int = DEFAULT_VOCAB_SIZE
    workers: tuple[str, ...] = ()
    """Decode workers whose pools are watched, host:port."""

    def __post_init__(self) -> None:
        if self.workload not in WORKLOADS:
            raise ValueError(f"--workload {self.workload}: choose one of {', '.join(WORKLOADS)}")
        if (self.workload == "trace") != (self.trace is not None):
            raise ValueError("--trace FILE and --workload trace belong together")
        if not self.request_rate > 0 or not 0 < self.burstiness < math.inf:
            raise ValueError("--request-rate and --burstiness must be positive numbers")
        if self.trace is not None and not math.isinf(self.request_rate):
            raise ValueError("a trace has times of its own: leave --request-rate out, or change --trace-speed")
        if math.isinf(self.request_rate) and self.burstiness != 1.0:
            raise ValueError("--burstiness needs a --request-rate")
        if not 0 <= self.range_ratio < 1:
            raise ValueError(f"--range-ratio {self.range_ratio:g} is not in 0 to below 1")
        if not 0 < self.trace_speed < math.inf:
            raise ValueError("--trace-speed must be a positive number")
        if not 1 <= self.trace_block <= BLOCK_TOKENS:
            raise ValueError(f"--trace-block {self.trace_block} is not in 1 to {BLOCK_TOKENS}")

    @property
    def is_closed_loop(self) -> bool:
        """A request is sent when another has ended, not at a time."""
        return self.max_concurrency is not None and math.isinf(self.request_rate) and self.trace is None

    @property
    def title(self) -> str:
        if self.is_closed_loop:
            return f"{self.workload}, {self.max_concurrency} at once, seed {self.seed}"
        if self.workload == "trace":
            load = f"at {self.trace_speed:g} times its speed"
        else:
            load = "all at once" if math.isinf(self.request_rate) else f"{self.request_rate:g} requests/s"
            load += f", burstiness {self.burstiness:g}" if self.burstiness != 1 else ""
        limit = "" if self.max_concurrency is None else f", at most {self.max_concurrency} at once"
        return f"{self.workload}, {load}{limit}, seed {self.seed}"


async def bench_serve(
    bench: ServeBench, *, json_path: Path | None = None, with_details: bool = False, plots: Path | None = None
) -> bool:
    """Measures, prints and writes; False if no request completed. Raises ValueError, OSError or ClientError."""
    tokens = TokenSource(seed=bench.seed, vocab_size=bench.vocab_size)
    async with AsyncClient(bench.address, access=bench.access) as client:
        model = await find_model(client, bench.model)
        await check_vocabulary(client, bench.vocab_size)
    workload = make_workload(bench, tokens, window=model.max_model_len)
    check_window(workload.requests, model)
    due_s = workload.due_s
    if due_s is None and not bench.is_closed_loop:
        due_s = arrival_times(
            len(workload.requests), rate=bench.request_rate, burstiness=bench.burstiness, seed=bench.seed
        )
    load_before = os.getloadavg()[0]
    async with bench.access.aio_channel(bench.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        await _warm_up(stub, bench, tokens)
        async with watch_pools(bench.workers, bench.peers) as pools:
            with _progress(len(workload.requests)) as on_done, _no_collections():
                result = await run(
                    stub,
                    workload.requests,
                    due_s,
                    model=model.id,
                    timeout_s=bench.timeout_s,
                    max_concurrency=bench.max_concurrency,
                    on_done=on_done,
                )
    load_after = os.getloadavg()[0]
    summary = summarize(result.requests, duration_s=result.duration_s, slo=bench.slo)
    print_summary(summary, title=f"{model.id}: {bench.title}", client_load=result.cpu_s / result.duration_s)
    if workload.num_skipped:
        print(f"{workload.num_skipped} requests of the trace do not fit the model and were left out")
    for pool in pools:
        print_pool_usage(pool)
    print(f"load average {load_before:.1f} before, {load_after:.1f} after, on {os.cpu_count()} cores")
    if json_path is not None:
        content = _about(bench, model.id, result, load=(load_before, load_after), num_skipped=workload.num_skipped)
        content |= as_json(summary) | {"pools": [pool.summary for pool in pools]}
        write_json(json_path, content | ({"requests": details(result.requests)} if with_details else {}))
    if plots is not None:
        for path in draw_plots(plots, result.requests, slo=bench.slo, title=f"{model.id}: {bench.title}"):
            print(f"drew {path}")
    return summary.completed > 0


def print_pool_usage(pool: PoolUsage) -> None:
    if pool.shares:
        mean, most = sum(pool.shares) / len(pool.shares), max(pool.shares)
        print(f"block pool of {pool.worker}: {mean:.0%} held on average, {most:.0%} at most; {pool.num_swaps} swaps")
    else:
        print(f"block pool of {pool.worker}: the worker answered no poll")


def make_workload(bench: ServeBench, tokens: TokenSource, *, window: int) -> Workload:
    """Raises ValueError or OSError for a trace that cannot be read."""
    if bench.trace is not None:
        rows = read_trace(bench.trace, limit=bench.num_prompts)
        return replay(rows, tokens, speed=bench.trace_speed, block_tokens=bench.trace_block, window=window)
    count = bench.num_prompts or DEFAULT_NUM_PROMPTS
    if bench.workload == "shared-prefix":
        requests = shared_prefixes(
            tokens,
            count=count,
            prefix_len=bench.prefix_len,
            num_prefixes=bench.num_prefixes,
            suffix_len=bench.suffix_len,
            output_len=bench.output_len,
            range_ratio=bench.range_ratio,
        )
    elif bench.workload == "mixed":
        requests = mixed_requests(
            tokens,
            count=count,
            mix=bench.mix,
            input_len=bench.input_len,
            long_input_len=bench.long_input_len,
            output_len=bench.output_len,
            short_deadline_s=bench.short_deadline_s,
            range_ratio=bench.range_ratio,
        )
    else:
        requests = unique_prompts(
            tokens,
            count=count,
            input_len=bench.input_len,
            output_len=bench.output_len,
            range_ratio=bench.range_ratio,
        )
    return Workload(requests=requests)


async def _warm_up(stub: inference_pb2_grpc.InferenceAsyncStub, bench: ServeBench, tokens: TokenSource) -> None:
    """One request after the other, with prompts of their own. Raises ValueError if one fails."""
    requests = unique_prompts(
        tokens,
        count=bench.num_warmups,
        input_len=bench.input_len,
        output_len=bench.output_len,
        stream=Stream.WARMUP,
    )
    done = await run(stub, requests, None, timeout_s=bench.timeout_s, max_concurrency=1)
    for request in done.requests:
        if not request.completed:
            raise ValueError(f"a warm-up request ended with {request.status.name}: {request.error}")


def _about(
    bench: ServeBench, model: str, result: Run, *, load: tuple[float, float], num_skipped: int
) -> dict[str, Any]:
    """The options, in JSON's types, and the circumstances."""
    options = asdict(bench)
    options |= {
        "num_prompts": len(result.requests),
        "trace": None if bench.trace is None else str(bench.trace),
        "request_rate": "inf" if math.isinf(bench.request_rate) else bench.request_rate,
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_id": model,
        **{name: options.pop(name) for name in ("num_prompts", "request_rate", "burstiness", "max_concurrency")},
        "options": options,
        "num_skipped": num_skipped,
        "load_before": load[0],
        "load_after": load[1],
        "client_cpu_seconds": result.cpu_s,
    }


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal's standard error, and nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), refresh_per_second=2) as progress:
        task = progress.add_task("requests", total=total)
        yield lambda: progress.advance(task)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Garbage collection would look through all prompts while tokens arrive."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
