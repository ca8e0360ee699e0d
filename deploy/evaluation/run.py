"""The evaluation: presets and baselines on the same windows of the same text."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvferry.deploy.evaluation import kivi
from kvferry.deploy.evaluation.dense import DenseStep, StepFactory, dense_logits
from kvferry.deploy.evaluation.packed import Observer, PackedRun
from kvferry.deploy.evaluation.scores import Oracle, Scores
from kvferry.deploy.models import LoadedModel
from kvferry.kernels.forward import CausalModel

BITS_CONTEXT = 4096
"""Tokens at which effective bits are stated."""
WINDOWS_AT_ONCE = 4
"""The log-probabilities of the unquantized cache are kept for so many windows."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One preset or baseline at one context length."""

    preset: str
    context: int
    windows: int
    predicted_tokens: int
    effective_bits: float
    perplexity: float
    perplexity_fp: float
    kl: float
    top1: float
    seconds: float


class Contender(Protocol):
    """Something that predicts the text on a cache of its own."""

    @property
    def effective_bits(self) -> float: ...

    def observe(self, windows: Tensor, *, context: int, observer: Observer) -> None: ...


class PackedContender:
    """A preset, through the product."""

    def __init__(self, run: PackedRun) -> None:
        self.run = run

    @property
    def effective_bits(self) -> float:
        return self.run.layout.effective_bits(BITS_CONTEXT)

    def observe(self, windows: Tensor, *, context: int, observer: Observer) -> None:
        self.run.observe(windows, context=context, observer=observer)


class DenseContender:
    """A baseline that fits one forward pass."""

    def __init__(self, model: CausalModel, step: StepFactory, effective_bits: float) -> None:
        self._model = model
        self._step = step
        self.effective_bits = effective_bits

    def observe(self, windows: Tensor, *, context: int, observer: Observer) -> None:
        for index, window in enumerate(windows):
            logits = dense_logits(self._model, window, self._step(context), context=context)
            for position, row in enumerate(logits):
                observer(index, position, row)


def kivi_contender(model: CausalModel, bits: int) -> DenseContender:
    return DenseContender(
        model,
        lambda context: kivi.KiviStep(context, bits=bits),
        kivi.effective_bits(BITS_CONTEXT, bits),
    )


def evaluate(
    loaded: LoadedModel,
    contenders: dict[str, Contender],
    windows_of: Callable[[int], Tensor],
    *,
    contexts: Sequence[int],
    on_done: Callable[[], None] = lambda: None,
) -> list[EvalResult]:
    """Every contender at every context, compared with the unquantized cache on the same windows.

    `windows_of(context)`: int64 [W, context + P + 1]; P tokens of each window are predicted. `on_done` is called
    after each contender and group of windows (`steps_of` says how often).
    """
    results = []
    for context in contexts:
        windows = windows_of(context)
        scores = {name: Scores() for name in contenders}
        seconds = dict.fromkeys(contenders, 0.0)
        for group in torch.split(windows, WINDOWS_AT_ONCE):
            logits = [dense_logits(loaded.model, window, DenseStep(), context=context) for window in group]
            oracle = Oracle(group, context=context, logits=torch.stack(logits))
            del logits
            for name, contender in contenders.items():
                started = time.monotonic()
                contender.observe(group, context=context, observer=functools.partial(scores[name].add, oracle))
                seconds[name] += time.monotonic() - started
                on_done()
        for name, contender in contenders.items():
            s = scores[name]
            results.append(
                EvalResult(
                    preset=name,
                    context=context,
                    windows=len(windows),
                    predicted_tokens=s.tokens,
                    effective_bits=contender.effective_bits,
                    perplexity=s.perplexity,
                    perplexity_fp=s.perplexity_fp,
                    kl=s.kl,
                    top1=s.top1,
                    seconds=seconds[name],
                )
            )
    return results


def steps_of(contenders: int, window_counts: Sequence[int]) -> int:
    """How often `evaluate` calls `on_done`."""
    return sum(-(-count // WINDOWS_AT_ONCE) for count in window_counts) * contenders


def agreement(ours: list[int], theirs: list[int]) -> float:
    """Share of an answer before the first token that differs from another one."""
    common = 0
    for a, b in zip(ours, theirs, strict=True):
        if a != b:
            break
        common += 1
    return common / len(theirs)
