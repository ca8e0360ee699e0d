"""`kvferry bench decode`: time of a decode step against transformers with its own caches, in one run.

All contenders decode greedily after the same number of tokens, in alternating rounds, because a shared machine's speed
changes from minute to minute. Only ratios within one run mean anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvferry.deploy.benchmark.context import dynamic_cache, quantized_cache, random_blocks
from kvferry.deploy.benchmark.packed_decoder import PackedDecoder
from kvferry.deploy.benchmark.step_time import StepTime
from kvferry.deploy.benchmark.transformers_decoder import TransformersDecoder, quantized_backend
from kvferry.deploy.worker_server import ModelRuntime

WARM_UP_STEPS = 2
FILL_NOTE = (
    "The contexts are random K and V on both sides (through kvferry's quantizer on its side), and each row has its own "
    "copy: a step's time does not depend on the values, and a real prefill would take minutes."
)


class Decoder(Protocol):
    def run(self, steps: int) -> list[StepTime]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int
    """Of each contender in each round."""
    rounds: int

    @property
    def generated(self) -> int:
        """Tokens that a sequence grows by."""
        return WARM_UP_STEPS + self.steps * self.rounds + 1

    def fit(self, context: int, window: int) -> int:
        """The context that leaves room for what is generated. Raises ValueError when the window has no room."""
        room = window - self.generated
        if context > window or room < 1:
            raise ValueError(
                f"{context} tokens of context and {self.generated} generated ones do not fit the model's window of "
                f"{window}: give a smaller --context, or fewer --rounds or --steps"
            )
        return min(context, room)


@dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """Milliseconds of a step of the whole batch: medians, and of the fastest step. None: not measured."""

    batch: int
    context: int
    kvferry_ms: float
    kvferry_min_ms: float
    transformers_ms: float
    """fp32 model, SDPA, DynamicCache."""
    transformers_min_ms: float
    transformers_native_ms: float | None
    """The same in the dtype that kvferry's model has, if it is another one."""
    transformers_native_min_ms: float | None
    transformers_quantized_ms: float | None
    """fp32 model, its quantized cache at 2 bits."""
    transformers_quantized_min_ms: float | None
    ratio: float
    """transformers_ms / kvferry_ms: above 1, kvferry is faster."""
    ratio_min: float
    ratio_native: float | None
    ratio_quantized: float | None
    kvferry_cpu_ms: float
    """Median of the processor time of all threads; see `step_time.py`."""
    transformers_cpu_ms: float
    ratio_cpu: float
    steps: int
    """Measured of each contender."""


class DecodeBench:
    """The models of a run, loaded once. `close` ends the engine's threads."""

    def __init__(self, runtime: ModelRuntime) -> None:
        if runtime.loaded.device.type != "cpu":
            raise ValueError(
                f"bench decode compares on the CPU, not on {runtime.loaded.device.type}: set device to cpu"
            )
        self.runtime = runtime
        self.native = runtime.loaded.model.dtype
        self.backend = quantized_backend()
        self._models = {dtype: self._load(dtype) for dtype in dict.fromkeys((torch.float32, self.native))}

    def _load(self, dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.runtime.loaded.source.path, dtype=dtype).eval()

    def run(self, plan: DecodePlan, *, on_round: Callable[[str], None] = lambda label: None) -> Iterator[DecodeCase]:
        """One case after the other; `on_round(label)` after each of its `plan.rounds` rounds and before the first.

        Raises ValueError for a context over the window, before anything is measured.
        """
        fitted = [plan.fit(context, self.runtime.max_model_len) for context in plan.contexts]
        for batch in plan.batches:
            for context in fitted:
                yield self._case(batch, context, plan, on_round)

    def _case(self, batch: int, context: int, plan: DecodePlan, on_round: Callable[[str], None]) -> DecodeCase:
        label = f"{batch} x {context} tokens"
        on_round(label)
        with ExitStack() as stack:
            contenders = {
                name: stack.enter_context(closing(make()))
                for name, make in self._makers(batch, context, plan.generated).items()
            }
            for contender in contenders.values():
                contender.run(WARM_UP_STEPS)
            times: dict[str, list[StepTime]] = {name: [] for name in contenders}
            for _ in range(plan.rounds):
                for name, contender in contenders.items():
                    times[name] += contender.run(plan.steps)
                on_round(label)
        return _case_of(batch, context, times)

    def _makers(self, batch: int, context: int, generated: int) -> dict[str, Callable[[], Decoder]]:
        def packed() -> Decoder:
            blocks = random_blocks(self.runtime, context, on_block=lambda index: None)
            return PackedDecoder.copies_of(self.runtime, blocks, batch=batch, max_tokens=generated)

        def dense(dtype: torch.dtype) -> Callable[[], Decoder]:
            model = self._models[dtype]
            return lambda: TransformersDecoder(
                model, dynamic_cache(model.config, batch=batch, context=context, dtype=dtype), batch=batch
            )

        makers: dict[str, Callable[[], Decoder]] = {"kvferry": packed, "transformers": dense(torch.float32)}
        if self.native != torch.float32:
            makers["native"] = dense(self.native)
        if (backend := self.backend) is not None:
            model = self._models[torch.float32]
            makers["quantized"] = lambda: TransformersDecoder(
                model,
                quantized_cache(model.config, backend=backend, batch=batch, context=context, dtype=torch.float32),
                batch=batch,
            )
        return makers


def _case_of(batch: int, context: int, times: dict[str, list[StepTime]]) -> DecodeCase:
    median = {name: statistics.median(t.wall for t in steps) * 1000 for name, steps in times.items()}
    least = {name: min(t.wall for t in steps) * 1000 for name, steps in times.items()}
    cpu = {name: statistics.median(t.cpu for t in steps) * 1000 for name, steps in times.items()}
    ratio = {name: value / median["kvferry"] for name, value in median.items()}
    return DecodeCase(
        batch=batch,
        context=context,
        kvferry_ms=median["kvferry"],
        kvferry_min_ms=least["kvferry"],
        transformers_ms=median["transformers"],
        transformers_min_ms=least["transformers"],
        transformers_native_ms=median.get("native"),
        transformers_native_min_ms=least.get("native"),
        transformers_quantized_ms=median.get("quantized"),
        transformers_quantized_min_ms=least.get("quantized"),
        ratio=ratio["transformers"],
        ratio_min=least["transformers"] / least["kvferry"],
        ratio_native=ratio.get("native"),
        ratio_quantized=ratio.get("quantized"),
        kvferry_cpu_ms=cpu["kvferry"],
        transformers_cpu_ms=cpu["transformers"],
        ratio_cpu=cpu["transformers"] / cpu["kvferry"],
        steps=len(times["kvferry"]),
    )
