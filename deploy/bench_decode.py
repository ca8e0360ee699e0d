"""`kvferry bench decode`: time per token of the decode engine against transformers with its own cache, in one run.

Both decode greedily from the same context on this machine, in alternating rounds, because a shared machine's speed
changes from minute to minute. Only ratios within one run mean anything.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache

from kvferry.decode.cache import PackedCache
from kvferry.decode.engine import DecodeEngine
from kvferry.decode.sequence import Sequence, TokenEvent
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime
from kvferry.kernels.sampling import SamplingParams, TokenHistory

STEP_TIMEOUT_S = 120.0
PREFILL_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class DecodeTimes:
    """Seconds per token of one implementation, one value a step."""

    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def bench_decode(config: ModelConfig, *, context: int, steps: int, rounds: int) -> list[DecodeTimes]:
    """Runs the comparison; the first result is kvferry's. Raises ValueError for a context over the window."""
    runtime = ModelRuntime(config)
    if not 1 < context + steps * rounds < runtime.max_model_len:
        raise ValueError(f"context and steps must fit the model's window of {runtime.max_model_len} tokens")
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(runtime.loaded.model.vocab_size, (context,), generator=generator).tolist()
    contenders: list[tuple[str, Callable[[int], list[float]]]] = [
        (f"kvferry, {_short(runtime.loaded.model.dtype)} model, packed cache", _PackedDecoder(runtime, token_ids).run)
    ]
    for dtype in dict.fromkeys((torch.float32, runtime.loaded.model.dtype)):
        contenders.append(
            (
                f"transformers, {_short(dtype)} model, {_short(dtype)} cache",
                _PlainDecoder(runtime.loaded.source.path, dtype, token_ids).run,
            )
        )
    for _, run in contenders:
        run(2)  # first calls allocate
    times: dict[str, list[float]] = {name: [] for name, _ in contenders}
    for _ in range(rounds):
        for name, run in contenders:
            times[name] += run(steps)
    return [DecodeTimes(name, seconds) for name, seconds in times.items()]


def print_decode_times(results: list[DecodeTimes], *, context: int) -> None:
    table = Table(title=f"decode, one sequence, {context} tokens of context")
    for column in ("", "median", "best", "median over kvferry's"):
        table.add_column(column, justify="right" if column else "left")
    for result in results:
        table.add_row(
            result.name,
            f"{result.median * 1000:.1f} ms",
            f"{min(result.seconds) * 1000:.1f} ms",
            f"{result.median / results[0].median:.2f}x",
        )
    Console(width=100).print(table)


class _PackedDecoder:
    """One sequence in the product's decode engine."""

    def __init__(self, runtime: ModelRuntime, token_ids: list[int]) -> None:
        blocks, first = runtime.engine.compute(token_ids, timeout_s=PREFILL_TIMEOUT_S)
        kernels, layout = runtime.selection.kernels, runtime.layout
        spare = 8
        cache = PackedCache(
            layout, num_blocks=blocks.num_blocks + spare, num_slots=1, kernels=kernels, device=runtime.loaded.device
        )
        for index in range(blocks.num_blocks):
            cache.load_block(index, torch.frombuffer(bytearray(blocks.payload(index)), dtype=torch.uint8), index)
        if blocks.num_blocks:
            cache.use_sinks(0, 0)
        cache.load_tail(0, blocks.tail_bytes())
        history = TokenHistory.of(token_ids)
        history.append(first.token_id)
        self._stamps: list[float] = []
        self._wanted = 0
        self._reached = threading.Event()
        self._resume = threading.Event()
        self._sequence = Sequence(
            num_prompt_tokens=len(token_ids),
            sampling=SamplingParams(max_tokens=spare * layout.block_size),
            history=history,
            slot=0,
            block_ids=list(range(blocks.num_blocks + spare)),
            num_blocks=blocks.num_blocks,
            tail_len=blocks.tail_len,
            last_token=first.token_id,
            listener=self,
        )
        self._engine = DecodeEngine(runtime.model, kernels, cache)
        self._started = False
        self._failure: Exception | None = None

    def run(self, steps: int) -> list[float]:
        self._stamps, self._wanted = [time.perf_counter()], steps
        self._reached.clear()
        self._resume.set()
        if not self._started:
            self._engine.add(self._sequence)
            self._started = True
        if not self._reached.wait(STEP_TIMEOUT_S * steps) or self._failure is not None:
            raise RuntimeError(f"the decode engine did not answer: {self._failure}")
        return [b - a for a, b in zip(self._stamps, self._stamps[1:], strict=False)]

    def block_used(self, sequence: Sequence) -> None:
        """All blocks were there from the beginning."""

    def released(self, sequence: Sequence) -> None:
        self._reached.set()

    def token(self, sequence: Sequence, event: TokenEvent) -> None:
        self._stamps.append(time.perf_counter())
        if len(self._stamps) > self._wanted:
            self._resume.clear()
            self._reached.set()
            self._resume.wait(STEP_TIMEOUT_S * 10)  # the other contenders' turn

    def error(self, sequence: Sequence, error: Exception) -> None:
        self._failure = error


class _PlainDecoder:
    """Plain transformers: its SDPA attention and its DynamicCache."""

    def __init__(self, path: str, dtype: torch.dtype, token_ids: list[int]) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self._cache = DynamicCache()
        self._next = self._forward(torch.tensor([token_ids]))

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        token: torch.Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
        return token

    def run(self, steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            self._next = self._forward(self._next)
            seconds.append(time.perf_counter() - started)
        return seconds


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
