"""`kvferry bench decode` and `kvferry bench memory`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from kvferry.deploy.cli_failure import fail
from kvferry.deploy.settings import Settings

DECODE_CONTEXTS = (1024, 4096, 8192)
DECODE_BATCHES = (1, 8)
MEMORY_CONTEXTS = (131_072,)
MEMORY_PRESETS = ("kv2", "kv16")

ModelOption = Annotated[str | None, typer.Option("--model", help='Hugging Face folder, .gguf file, hub id, or "demo".')]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]
ThreadsOption = Annotated[int, typer.Option(min=0, help="Threads of every contender; 0: one a core.")]


def bench_decode_command(
    model: ModelOption = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of context; may be repeated. Default: 1024, 4096, 8192.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences in a step; may be repeated. Default: 1, 8.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="kv2, kv3, kv4, kv16 or a .json file of a spec.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each contender in a round.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds.")] = 5,
    threads: ThreadsOption = 0,
    json_path: JsonOption = None,
) -> None:
    """Time of a decode step against transformers with its own caches, on this machine, in one run.

    A context as long as the model's window is shortened by what is generated.
    """
    from kvferry.deploy.assembly import model_config
    from kvferry.deploy.benchmark.decode_command import run_decode_bench
    from kvferry.deploy.benchmark.decode_run import DecodePlan

    plan = DecodePlan(
        contexts=tuple(context or DECODE_CONTEXTS),
        batches=tuple(batch or DECODE_BATCHES),
        steps=steps,
        rounds=rounds,
    )
    try:
        settings = _settings(model, preset)
        run_decode_bench(
            model_config(settings),
            plan,
            preset=settings.preset,
            threads=_threads(threads),
            json_path=json_path,
        )
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))


def bench_memory_command(
    model: ModelOption = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of context; may be repeated. Default: 131072.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="kv2, kv3, kv4, kv16 or a .json file; may be repeated. Default: kv2, kv16.")
    ] = None,
    fill: Annotated[
        str, typer.Option(help="random: quantize random K and V (seconds). prefill: compute the prompt (quadratic).")
    ] = "random",
    tokens: Annotated[int, typer.Option(min=1, max=100, help="Tokens decoded and timed.")] = 16,
    stretch: Annotated[
        bool, typer.Option(help="Stretch the window of a model where a context is longer; its answers mean nothing.")
    ] = True,
    threads: ThreadsOption = 0,
    timeout: Annotated[float, typer.Option(min=1.0, help="Longest case, in seconds.")] = 3600.0,
    json_path: JsonOption = None,
) -> None:
    """What a long context takes: memory by the operating system's count, and time per token, in fresh processes.

    With --fill random, transformers' own 16-bit cache is measured as well, where it fits into memory.
    """
    from kvferry.deploy.benchmark.memory_command import run_memory_bench
    from kvferry.deploy.benchmark.memory_run import MemoryPlan

    try:
        if fill not in ("random", "prefill"):
            raise ValueError(f"--fill {fill}: choose random or prefill")
        plan = MemoryPlan(
            model=_settings(model, None).model,
            presets=tuple(preset or MEMORY_PRESETS),
            contexts=tuple(context or MEMORY_CONTEXTS),
            fill="prefill" if fill == "prefill" else "random",
            tokens=tokens,
            threads=_threads(threads),
            stretch=stretch,
            case_timeout_s=timeout,
        )
        run_memory_bench(plan, json_path=json_path)
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))


def _threads(threads: int) -> int:
    return threads or len(os.sched_getaffinity(0))


def _settings(model: str | None, preset: str | None) -> Settings:
    given = {name: value for name, value in (("model", model), ("preset", preset)) if value is not None}
    try:
        return Settings.load(None, **given)
    except ValidationError as error:
        raise ValueError(f"the configuration is not valid: {error}") from error
