"""`kvferry bench chooser`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvferry.deploy.cli_failure import fail
from kvferry.deploy.spec_file import resolve_spec


def bench_chooser_command(
    model: Annotated[str, typer.Option(help='Hugging Face folder, .gguf file, hub id, or "demo".')] = "demo",
    blocks: Annotated[
        list[int] | None, typer.Option(min=1, help="Complete blocks of the prompt; may be repeated. Default: 1, 2, 3.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Prompts of each contender.")] = 15,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    preset: Annotated[str, typer.Option(help="kv2, kv3, kv4, kv16 or a .json file of a spec.")] = "kv2",
    block_size: Annotated[int | None, typer.Option(help="Tokens a block.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Short prompts with a store, hit and miss, against no store at all, on this machine, in one run."""
    from kvferry.deploy.bench_chooser import bench_chooser, print_chooser_cases
    from kvferry.deploy.worker_server import ModelConfig

    try:
        cases = bench_chooser(
            ModelConfig(model=model, dtype=dtype, spec=resolve_spec(preset, block_size=block_size)),
            blocks=blocks or [1, 2, 3],
            rounds=rounds,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
        print_chooser_cases(cases)
        if json_path is not None:
            json_path.write_text(json.dumps({"cases": [asdict(case) for case in cases]}, indent=2) + "\n")
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
