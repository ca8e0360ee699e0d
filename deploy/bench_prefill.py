"""`kvferry bench prefill`: time of canonical, quantizing prefill against transformers' own, in one run.

Both prefill the same random prompt on this machine, in alternating rounds, because a shared machine's speed changes
from minute to minute. Only ratios within one run mean anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvferry.deploy.worker_server import ModelConfig, ModelRuntime

PREFILL_TIMEOUT_S = 1800.0
WARM_UP_TOKENS = 300


@dataclass(frozen=True)
class PrefillCase:
    """Medians over the rounds of one prompt length against one dtype of transformers."""

    tokens: int
    kvferry_s: float
    kvferry_dtype: str
    transformers_s: float
    transformers_dtype: str
    ratio: float
    """Speed of kvferry over speed of transformers: the median of the ratios of rounds. Above 1: kvferry is faster."""
    rounds: int
    threads: int
    kvferry_cpu_s: float
    transformers_cpu_s: float
    cpu_ratio: float
    """As `ratio`, of processor time: with one thread it does not count what other processes take of a busy machine."""


def bench_prefill(
    config: ModelConfig,
    *,
    lengths: Sequence[int],
    rounds: int,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    progress: Callable[[str], None] = lambda line: None,
) -> list[PrefillCase]:
    """Runs the comparison, by length and dtype. Raises ValueError for a length over the model's window."""
    runtime = ModelRuntime(config)
    try:
        too_long = [n for n in lengths if not 1 <= n < runtime.max_model_len]
        if too_long:
            raise ValueError(f"{too_long} tokens do not fit the model's window of {runtime.max_model_len} tokens")
        own_dtype = runtime.loaded.model.dtype
        contenders: list[tuple[str, Callable[[list[int]], object]]] = [
            ("kvferry", lambda token_ids: runtime.engine.compute(token_ids, timeout_s=PREFILL_TIMEOUT_S))
        ]
        for dtype in dtypes:
            contenders.append((_short(dtype), _PlainPrefill(runtime.loaded.source.path, dtype).run))
        generator = torch.Generator().manual_seed(0)
        cases = []
        for length in lengths:
            token_ids = torch.randint(runtime.model.vocab_size, (length,), generator=generator).tolist()
            for _, run in contenders:
                run(token_ids[:WARM_UP_TOKENS])  # first calls allocate
            seconds: dict[str, list[float]] = {name: [] for name, _ in contenders}
            cpu_seconds: dict[str, list[float]] = {name: [] for name, _ in contenders}
            for number in range(rounds):
                for name, run in contenders:
                    started, cpu_started = time.perf_counter(), time.process_time()
                    run(token_ids)
                    seconds[name].append(time.perf_counter() - started)
                    cpu_seconds[name].append(time.process_time() - cpu_started)
                progress(
                    f"{length} tokens, round {number + 1} of {rounds}: "
                    + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
                )
            ours, our_cpu = seconds.pop("kvferry"), cpu_seconds.pop("kvferry")
            cases += [
                PrefillCase(
                    tokens=length,
                    kvferry_s=statistics.median(ours),
                    kvferry_dtype=_short(own_dtype),
                    transformers_s=statistics.median(theirs),
                    transformers_dtype=name,
                    ratio=_ratio(ours, theirs),
                    rounds=rounds,
                    threads=torch.get_num_threads(),
                    kvferry_cpu_s=statistics.median(our_cpu),
                    transformers_cpu_s=statistics.median(cpu_seconds[name]),
                    cpu_ratio=_ratio(our_cpu, cpu_seconds[name]),
                )
                for name, theirs in seconds.items()
            ]
        return cases
    finally:
        runtime.close()


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def print_prefill_cases(cases: list[PrefillCase]) -> None:
    table = Table(title="prefill of one prompt, medians; the ratio is speed over transformers' with SDPA")
    for column in ("tokens", "kvferry", "", "transformers", "", "ratio", "of CPU time"):
        table.add_column(column, justify="right")
    for case in cases:
        table.add_row(
            str(case.tokens),
            f"{case.kvferry_s:.2f} s",
            case.kvferry_dtype,
            f"{case.transformers_s:.2f} s",
            case.transformers_dtype,
            f"{case.ratio:.2f}x",
            f"{case.cpu_ratio:.2f}x",
        )
    Console(width=100).print(table)


class _PlainPrefill:
    """Plain transformers: the whole prompt in one forward pass, its SDPA attention and its DynamicCache."""

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        self._model: PreTrainedModel = model.eval()

    @torch.inference_mode()
    def run(self, token_ids: list[int]) -> int:
        out = self._model(torch.tensor([token_ids]), past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
