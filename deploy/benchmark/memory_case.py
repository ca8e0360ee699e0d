"""One context of `kvferry bench memory`, in a process of its own, so that the peak of its memory is its own.

`python -m kvferry.deploy.benchmark.memory_case` reads a request as one line of JSON and writes JSON lines:
{"phase": ..., "done": fraction} again and again, then {"result": ...} or {"error": ...}.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from kvferry.deploy.benchmark.context import dynamic_cache, prefilled_blocks, random_blocks
from kvferry.deploy.benchmark.packed_decoder import PackedDecoder
from kvferry.deploy.benchmark.resident_memory import peak_bytes, reset_peak, resident_bytes, return_freed_memory
from kvferry.deploy.benchmark.transformers_decoder import TransformersDecoder
from kvferry.deploy.model_config import resolve_dtype
from kvferry.deploy.spec_file import resolve_spec
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime
from kvferry.prefill.prompt_blocks import LocalPromptBlocks

TRANSFORMERS = "transformers"
WARM_UP_STEPS = 2

Fill = Literal["prefill", "random"]
Report = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    model_path: str
    preset: str
    """A preset or spec file of kvferry, or "transformers": its DynamicCache in the model's dtype."""
    context: int
    fill: Fill
    tokens: int
    """Decoded and timed."""
    threads: int
    prefill_timeout_s: float


@dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """What the operating system counted, in bytes, and times."""

    preset: str
    context: int
    fill: Fill
    packed_bytes_per_token: float
    """What the cache keeps, sinks and tail included, over the context's tokens."""
    bf16_bytes_per_token: int
    cache_bytes: int
    """`packed_bytes_per_token` times the context."""
    rss_before_bytes: int
    """Resident with the model loaded, before the cache."""
    rss_filled_bytes: int
    """Resident with the cache filled, freed memory returned."""
    peak_rss_bytes: int
    """Peak of filling and decoding."""
    load_peak_rss_bytes: int
    """Peak of loading the model, which may be the higher one."""
    fill_peak_bytes: int
    """Peak of filling over `rss_before_bytes`: the cache, and what filling it needs at a time."""
    step_scratch_bytes: int
    """Peak of one decode step over what was resident before it."""
    step_scratch_share: float
    """That over `cache_bytes`."""
    fill_seconds: float
    ms_per_token: float
    min_ms_per_token: float
    cpu_ms_per_token: float
    """Processor time of all threads; see `step_time.py`."""


def measure(request: MemoryRequest, report: Report) -> MemoryCase:
    """Raises ValueError for what cannot be measured, RuntimeError when an engine fails."""
    torch.set_num_threads(request.threads)
    with ExitStack() as stack:
        if request.preset == TRANSFORMERS:
            return _measure(request, report, _dense_filler(request))
        config = ModelConfig(model=request.model_path, spec=resolve_spec(request.preset), device="cpu")
        runtime = stack.enter_context(closing(ModelRuntime(config)))
        return _measure(request, report, _packed_filler(runtime, request))


@dataclass(frozen=True)
class _Filled:
    decoder: PackedDecoder | TransformersDecoder
    cache_bytes: int
    bf16_bytes_per_token: int


def _measure(request: MemoryRequest, report: Report, fill: Callable[[Report], _Filled]) -> MemoryCase:
    """`fill` makes the filled cache; the model is loaded already."""
    load_peak = peak_bytes()
    return_freed_memory()
    reset_peak()
    before, started = resident_bytes(), time.perf_counter()
    filled = fill(report)
    fill_seconds = time.perf_counter() - started
    with closing(filled.decoder) as decoder:
        fill_peak = peak_bytes()
        return_freed_memory()
        rss_filled = resident_bytes()
        report("decode", 0.0)
        reset_peak()
        decoder.run(WARM_UP_STEPS)  # first calls allocate for good
        peak = max(fill_peak, peak_bytes())
        return_freed_memory()
        reset_peak()
        still = resident_bytes()
        decoder.run(1)
        scratch = max(0, peak_bytes() - still)
        times = decoder.run(request.tokens)
        peak = max(peak, peak_bytes())
    return MemoryCase(
        preset=request.preset,
        context=request.context,
        fill=request.fill,
        packed_bytes_per_token=filled.cache_bytes / request.context,
        bf16_bytes_per_token=filled.bf16_bytes_per_token,
        cache_bytes=filled.cache_bytes,
        rss_before_bytes=before,
        rss_filled_bytes=rss_filled,
        peak_rss_bytes=peak,
        load_peak_rss_bytes=load_peak,
        fill_peak_bytes=fill_peak - before,
        step_scratch_bytes=scratch,
        step_scratch_share=scratch / filled.cache_bytes,
        fill_seconds=fill_seconds,
        ms_per_token=statistics.median(t.wall for t in times) * 1000,
        min_ms_per_token=min(t.wall for t in times) * 1000,
        cpu_ms_per_token=statistics.median(t.cpu for t in times) * 1000,
    )


def _packed_filler(runtime: ModelRuntime, request: MemoryRequest) -> Callable[[Report], _Filled]:
    if request.context + _generated(request) > runtime.max_model_len:
        raise ValueError(f"{request.context} tokens are beyond the model's window of {runtime.max_model_len}")

    def fill(report: Report) -> _Filled:
        total = max(1, request.context // runtime.layout.block_size)

        def on_block(index: int) -> None:
            report(request.fill, (index + 1) / total)

        blocks = (
            random_blocks(runtime, request.context, on_block=on_block)
            if request.fill == "random"
            else prefilled_blocks(runtime, request.context, timeout_s=request.prefill_timeout_s, on_block=on_block)
        )
        decoder = PackedDecoder.in_place(runtime, blocks, max_tokens=_generated(request))
        return _Filled(decoder, _held_bytes(blocks), runtime.layout.bytes_per_token_bf16)

    return fill


def _held_bytes(blocks: LocalPromptBlocks) -> int:
    """Of blocks, sinks and tail."""
    return sum(part.numel() * part.element_size() for part in (blocks.pool, blocks.sinks, blocks.tail))


def _dense_filler(request: MemoryRequest) -> Callable[[Report], _Filled]:
    if request.fill != "random":
        raise ValueError("transformers' cache is filled with random numbers only: --fill random")
    dtype = resolve_dtype("auto", torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(request.model_path, dtype=dtype).eval()

    def fill(report: Report) -> _Filled:
        report("random", 0.0)
        cache = dynamic_cache(model.config, batch=1, context=request.context, dtype=dtype)
        held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        return _Filled(TransformersDecoder(model, cache, batch=1), held, held * 2 // (request.context * dtype.itemsize))

    return fill


def _generated(request: MemoryRequest) -> int:
    """Tokens that the sequence grows by."""
    return WARM_UP_STEPS + 1 + request.tokens + 1


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not end up between the lines
    last_time, last_phase = 0.0, ""

    def say(**line: Any) -> None:
        out.write(json.dumps(line) + "\n")

    def report(phase: str, done: float) -> None:
        nonlocal last_time, last_phase
        now = time.monotonic()
        if now - last_time > 0.5 or phase != last_phase:
            last_time, last_phase = now, phase
            say(phase=phase, done=done)

    request = MemoryRequest(**json.loads(sys.stdin.readline()))
    try:
        say(result=asdict(measure(request, report)))
    except (OSError, RuntimeError, ValueError) as error:  # TimeoutError is an OSError
        say(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
