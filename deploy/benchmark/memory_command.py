"""`kvferry bench memory`: runs the cases behind a progress bar, prints them and writes them down."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvferry.deploy.benchmark.environment import Environment
from kvferry.deploy.benchmark.memory_case import TRANSFORMERS, MemoryCase
from kvferry.deploy.benchmark.memory_run import MemoryPlan, Skipped, run_memory_plan, window_of
from kvferry.deploy.models import find_model

RANDOM_NOTE = "Filled with random K and V through the real quantizer, not by prefill: the same bytes, other values."
STRETCHED_NOTE = (
    "The model's window of {window:,} is stretched by YaRN: memory and time are measured, answers mean nothing."
)


def run_memory_bench(plan: MemoryPlan, *, json_path: Path | None) -> None:
    """Raises ValueError for what cannot be measured, RuntimeError for a process that fails, OSError for the file."""
    load_before = os.getloadavg()[0]
    source = find_model(plan.model)
    window = window_of(source)
    results = _run(plan)
    cases = [result for result in results if isinstance(result, MemoryCase)]
    skipped = [result for result in results if isinstance(result, Skipped)]
    environment = Environment.now(
        model=source.name, preset=", ".join(plan.presets), threads=plan.threads, load_before=load_before
    )
    notes = [RANDOM_NOTE] if plan.fill == "random" else []
    if max(plan.contexts) > window:
        notes.append(STRETCHED_NOTE.format(window=window))
    _print(cases, skipped, environment, notes)
    if json_path is not None:
        report = {
            "environment": asdict(environment),
            "notes": notes,
            "cases": [asdict(case) for case in cases],
            "skipped": [asdict(case) for case in skipped],
        }
        json_path.write_text(json.dumps(report, indent=2) + "\n")


def _run(plan: MemoryPlan) -> list[MemoryCase | Skipped]:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=1.0)
        return list(run_memory_plan(plan, lambda label, done: progress.update(task, completed=done, description=label)))


def _print(cases: list[MemoryCase], skipped: list[Skipped], environment: Environment, notes: list[str]) -> None:
    table = Table(
        title=f"{environment.model}: one sequence's cache, each row a fresh process; peaks as Linux counts them"
    )
    for column in (
        "cache",
        "context",
        "fill",
        "bytes a token (of 16 bits)",
        "cache",
        "before",
        "peak",
        "a step's scratch",
    ):
        table.add_column(column, justify="left" if column == "fill" else "right")
    table.add_column("fill, s", justify="right")
    table.add_column("ms a token (fastest)", justify="right")
    table.add_column("of processor", justify="right")
    for case in cases:
        table.add_row(
            "transformers, DynamicCache" if case.preset == TRANSFORMERS else case.preset,
            f"{case.context:,}",
            case.fill,
            f"{case.packed_bytes_per_token:,.0f} ({case.bf16_bytes_per_token / case.packed_bytes_per_token:.2f}x less)",
            _mib(case.cache_bytes),
            _mib(case.rss_before_bytes),
            _mib(case.peak_rss_bytes),
            f"{_mib(case.step_scratch_bytes)} ({case.step_scratch_share:.2%})",
            f"{case.fill_seconds:.0f}",
            f"{case.ms_per_token:.0f} ({case.min_ms_per_token:.0f})",
            f"{case.cpu_ms_per_token:.0f}",
        )
    console = Console(width=160)
    console.print(table)
    for gap in skipped:
        console.print(f"not measured: {gap.preset} at {gap.context:,} tokens, because {gap.reason}")
    console.print(f"{environment.sentence}. MiB, resident; before: the model is loaded, the cache not made.")
    for note in notes:
        console.print(note)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}" if count < 10 * 2**20 else f"{count / 2**20:,.0f}"
