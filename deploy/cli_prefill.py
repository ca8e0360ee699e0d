"""`kvferry bench prefill`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvferry.deploy.cli_failure import fail
from kvferry.deploy.spec_file import resolve_spec


def bench_prefill_command(
    model: Annotated[str, typer.Option(help='Hugging Face folder, .gguf file, hub id, or "demo".')] = "demo",
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of the prompt; may be repeated. Default: 4096.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Prompts of each contender.")] = 3,
    dtype: Annotated[str, typer.Option(help="kvferry's: auto, float32 or bfloat16.")] = "auto",
    preset: Annotated[str, typer.Option(help="kv2, kv3, kv4, kv16 or a .json file of a spec.")] = "kv2",
    threads: Annotated[int, typer.Option(min=0, help="0: one a core. 1 is steady on a busy machine.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Prefill of one prompt against plain transformers in fp32 and bf16 (SDPA), on this machine, in one run."""
    import torch

    from kvferry.deploy.bench_prefill import bench_prefill, print_prefill_cases
    from kvferry.deploy.worker_server import ModelConfig

    if threads:
        torch.set_num_threads(threads)
    try:
        cases = bench_prefill(
            ModelConfig(model=model, dtype=dtype, spec=resolve_spec(preset)),
            lengths=tokens or [4096],
            rounds=rounds,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
        print_prefill_cases(cases)
        if json_path is not None:
            json_path.write_text(json.dumps({"cases": [asdict(case) for case in cases]}, indent=2) + "\n")
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
