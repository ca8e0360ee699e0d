"""`kvferry bench decode`: runs the cases behind a progress bar, prints them and writes them down."""

from __future__ import annotations

import json
import os
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvferry.deploy.benchmark.decode_run import FILL_NOTE, DecodeBench, DecodeCase, DecodePlan
from kvferry.deploy.benchmark.environment import Environment, short_dtype
from kvferry.deploy.benchmark.transformers_decoder import QUANTIZED_MISSING
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime


def run_decode_bench(
    config: ModelConfig, plan: DecodePlan, *, preset: str, threads: int, json_path: Path | None
) -> None:
    """Raises ValueError for what cannot be measured, RuntimeError for an engine that fails, OSError for the file."""
    torch.set_num_threads(threads)
    load_before = os.getloadavg()[0]
    with closing(ModelRuntime(config)) as runtime:
        bench = DecodeBench(runtime)
        cases = _run(bench, plan)
        dtype = short_dtype(bench.native)
        environment = Environment.now(
            model=runtime.loaded.source.name, preset=preset, threads=threads, load_before=load_before
        )
        _print(cases, environment, dtype=dtype, backend=bench.backend)
        if json_path is not None:
            report = {
                "environment": asdict(environment),
                "kernels": runtime.selection.kernels.name,
                "dtype": dtype,
                "quantized_backend": bench.backend,
                "fill": "random",
                "note": FILL_NOTE,
                "cases": [asdict(case) for case in cases],
            }
            json_path.write_text(json.dumps(report, indent=2) + "\n")


def _run(bench: DecodeBench, plan: DecodePlan) -> list[DecodeCase]:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        total = len(plan.contexts) * len(plan.batches) * (plan.rounds + 1)
        task = progress.add_task("decode", total=total)
        return list(bench.run(plan, on_round=lambda label: progress.update(task, advance=1, description=label)))


def _print(cases: list[DecodeCase], environment: Environment, *, dtype: str, backend: str | None) -> None:
    table = Table(title="a decode step of the whole batch: median (fastest), ms; ratio: transformers fp32 over kvferry")
    columns = [
        "batch",
        "context",
        f"kvferry, {dtype}, {environment.preset}",
        "transformers fp32",
        "ratio",
        "of processor time",
    ]
    if dtype != "fp32":
        columns.append(f"transformers {dtype}")
    columns.append("transformers fp32, 2-bit cache")
    for column in columns:
        table.add_column(column, justify="right")
    for case in cases:
        row = [
            str(case.batch),
            f"{case.context:,}",
            _times(case.kvferry_ms, case.kvferry_min_ms),
            _times(case.transformers_ms, case.transformers_min_ms),
            f"{case.ratio:.2f}x ({case.ratio_min:.2f}x)",
            f"{case.ratio_cpu:.2f}x",
        ]
        if dtype != "fp32":
            row.append(_times(case.transformers_native_ms, case.transformers_native_min_ms))
        row.append(_times(case.transformers_quantized_ms, case.transformers_quantized_min_ms))
        table.add_row(*row)
    console = Console(width=140)
    console.print(table)
    console.print(f"{environment.sentence}. {cases[0].steps if cases else 0} steps of each, in turns.")
    console.print(FILL_NOTE)
    console.print(
        QUANTIZED_MISSING if backend is None else f"transformers' quantized cache: backend {backend}.", markup=False
    )
    if environment.is_busy:
        console.print(
            "Warning: the machine is busy with something else. Steps of several threads then wait for threads that are "
            "not scheduled, and ratios say little; with --threads 1, those of processor time are steady."
        )


def _times(median_ms: float | None, least_ms: float | None) -> str:
    return "-" if median_ms is None or least_ms is None else f"{median_ms:.1f} ({least_ms:.1f})"
