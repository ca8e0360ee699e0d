"""One evaluation from its options to its report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from kvferry.deploy.evaluation import quantized_cache
from kvferry.deploy.evaluation.needle import NeedleResult, find_needles
from kvferry.deploy.evaluation.packed import PackedRun
from kvferry.deploy.evaluation.report import plot, print_needles, print_results, write_json
from kvferry.deploy.evaluation.run import (
    BITS_CONTEXT,
    Contender,
    PackedContender,
    agreement,
    evaluate,
    kivi_contender,
    steps_of,
)
from kvferry.deploy.evaluation.text import read_text, windows
from kvferry.deploy.models import LoadedModel, find_model, load_model, load_tokenizer
from kvferry.deploy.spec_file import resolve_spec

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FP_PRESET = "kv16"
"""The unquantized cache where a whole answer is compared."""


@dataclass(frozen=True, kw_only=True)
class EvalPlan:
    """What to measure. Raises ValueError for a plan that cannot be."""

    model: str
    presets: tuple[str, ...]
    baselines: tuple[str, ...]
    text: Path | None
    contexts: tuple[int, ...]
    windows: int
    predict: int
    generate: int
    needle_lengths: tuple[int, ...]
    kernels: str | None

    def __post_init__(self) -> None:
        if any(context < 1 for context in self.contexts):
            raise ValueError(f"contexts {list(self.contexts)} must be positive")

    def check_window(self, max_model_len: int) -> None:
        """Raises ValueError where the model's window is too small."""
        longest = max((*(c + max(self.predict, self.generate) + 1 for c in self.contexts), *self.needle_lengths))
        if longest > max_model_len:
            raise ValueError(f"the plan needs {longest} tokens, the model's window has {max_model_len}")


def run_plan(plan: EvalPlan, *, json_path: Path | None, plots: Path | None) -> None:
    """Measures, prints and writes. Raises ValueError, OSError, or what a run raised."""
    text = read_text(plan.text)
    source = find_model(plan.model)
    tokenizer = load_tokenizer(source)
    token_ids = [int(i) for i in tokenizer.encode(text)]
    loaded = load_model(source, device=torch.device("cpu"), dtype=torch.float32)
    plan.check_window(loaded.model.max_model_len)

    def windows_of(context: int) -> Tensor:
        return windows(token_ids, length=context + plan.predict + 1, count=plan.windows)

    counts = [len(windows_of(context)) for context in plan.contexts]  # refuses a short text before minutes of work
    agreements: dict[str, float] = {}
    needles: list[NeedleResult] = []
    with ExitStack() as stack:
        runs = _packed_runs(loaded, plan, stack)
        contenders = _contenders(loaded, plan, runs)
        progress = stack.enter_context(
            Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        )

        def bar(name: str, total: int) -> Callable[[], None]:
            task = progress.add_task(name, total=total)
            return lambda: progress.advance(task)

        done = bar("predicting", steps_of(len(contenders), counts))
        results = evaluate(loaded, contenders, windows_of, contexts=plan.contexts, on_done=done)
        if plan.generate:
            agreements = _agreements(plan, runs, windows_of(plan.contexts[0]), bar)
        if plan.needle_lengths:
            done = bar("pass keys", len(runs) * len(plan.needle_lengths) * len(DEPTHS))
            for name, run in runs.items():
                needles += find_needles(name, run, tokenizer, lengths=plan.needle_lengths, depths=DEPTHS, on_step=done)
    print_results(results, agreements)
    if needles:
        print_needles(needles)
    if json_path is not None:
        text_name = "default" if plan.text is None else str(plan.text)
        write_json(json_path, model=plan.model, text=text_name, results=results, agreements=agreements, needles=needles)
    if plots is not None:
        for path in plot(plots, results=results, needles=needles):
            print(f"drew {path}")


def _packed_runs(loaded: LoadedModel, plan: EvalPlan, stack: ExitStack) -> dict[str, PackedRun]:
    """One for each preset; with 16 bits too, where whole answers are compared with it."""
    names = list(dict.fromkeys(plan.presets))
    if (plan.generate or plan.needle_lengths) and FP_PRESET not in names:
        names.append(FP_PRESET)
    runs = {}
    for name in names:
        runs[name] = PackedRun(loaded, resolve_spec(name), kernels=plan.kernels)
        stack.callback(runs[name].close)
    return runs


def _contenders(loaded: LoadedModel, plan: EvalPlan, runs: dict[str, PackedRun]) -> dict[str, Contender]:
    contenders: dict[str, Contender] = {name: PackedContender(runs[name]) for name in plan.presets}
    for name in plan.baselines:
        contenders[name] = kivi_contender(loaded.model, int(name.removeprefix("kivi")))
    if quantized_cache.is_installed():
        for bits in (2, 4):
            contenders[f"quanto{bits}"] = quantized_cache.QuantizedCacheContender(
                loaded, bits, bits_context=BITS_CONTEXT
            )
    return contenders


def _agreements(
    plan: EvalPlan, runs: dict[str, PackedRun], text: Tensor, bar: Callable[[str, int], Callable[[], None]]
) -> dict[str, float]:
    prompts = text[:, : plan.contexts[0]].tolist()
    done = bar("writing", len(runs) * plan.generate)
    answers = {name: run.generate(prompts, max_tokens=plan.generate, on_step=done) for name, run in runs.items()}
    expected = answers[FP_PRESET]
    return {
        name: sum(agreement(a, b) for a, b in zip(answer, expected, strict=True)) / len(expected)
        for name, answer in answers.items()
        if name != FP_PRESET or name in plan.presets
    }
