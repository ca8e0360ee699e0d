"""`kvferry bench transfer`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvferry.deploy.cli_failure import fail

DEFAULT_LINKS = ("100mbit", "1gbit", "10gbit", "unshaped")
DEFAULT_TOKENS = (1024, 2048, 4096, 8000)
"""The demo model has 8,192 tokens of context, the answer included."""


def bench_transfer_command(
    model: Annotated[str, typer.Option(help='Hugging Face folder, .gguf file, hub id, or "demo".')] = "demo",
    link: Annotated[
        list[str] | None,
        typer.Option(help="100mbit, 1gbit, unshaped, ...; may be repeated. Default: 100mbit to 10gbit, and unshaped."),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of the prompt; may be repeated. Default: 1024 to 8000.")
    ] = None,
    path: Annotated[list[str] | None, typer.Option(help="node or redis; may be repeated. Default: both.")] = None,
    preset: Annotated[str, typer.Option(help="Of the packed blocks: kv2, kv3, kv4 or a .json file of a spec.")] = "kv2",
    block_size: Annotated[int | None, typer.Option(help="Tokens; default: the preset's.")] = None,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens of a handed-over request's answer.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Prompts for each link and length.")] = 1,
    compare_store: Annotated[
        bool, typer.Option("--compare-store", help="Also hand over through the store: one more prefill a round.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of TTFT; needs kvferry[bench].")] = None,
) -> None:
    """Packed against unquantized blocks over a shaped link between two network namespaces. Needs root."""
    from kvferry.deploy.bench_transfer import PATHS, TransferPlan, bench_transfer
    from kvferry.deploy.bench_transfer_report import plot_transfer, print_transfer
    from kvferry.deploy.plotting import require_matplotlib

    try:
        if plot is not None:
            require_matplotlib()
        unknown = set(path or []) - set(PATHS)
        if unknown:
            raise ValueError(f"no path {', '.join(sorted(unknown))}: choose of {', '.join(PATHS)}")
        plan = TransferPlan(
            links=link or DEFAULT_LINKS,
            prompt_tokens=tokens or DEFAULT_TOKENS,
            paths=path or PATHS,
            model=model,
            preset=preset,
            block_size=block_size,
            output_tokens=output_len,
            rounds=rounds,
            compare_store=compare_store,
        )
        results = bench_transfer(plan, progress=lambda line: print(line, file=sys.stderr, flush=True))
        print_transfer(results)
        if json_path is not None:
            json_path.write_text(json.dumps(results.as_json(), indent=2) + "\n")
        if plot is not None:
            plot_transfer(results, plot)
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
