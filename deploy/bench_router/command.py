"""The options of `kvferry bench router`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvferry.deploy.cli_failure import fail


def bench_router_command(
    policy: Annotated[
        list[str] | None, typer.Option(help="prefix, least-loaded or round-robin; may be repeated. Default: all.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help='Hugging Face folder, .gguf file, hub id, or "demo".')] = "demo",
    documents: Annotated[int, typer.Option(min=1, help="Shared beginnings, new ones in each round.")] = 6,
    requests: Annotated[int, typer.Option(min=1, help="Of each policy in each round.")] = 24,
    document_len: Annotated[int, typer.Option(min=2, help="Tokens of a document.")] = 512,
    question_len: Annotated[int, typer.Option(min=1, help="Tokens after it.")] = 24,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 4,
    request_rate: Annotated[float, typer.Option(min=0.01, help="Requests a second, a Poisson process.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="The policies take turns, round by round.")] = 3,
    block_size: Annotated[int | None, typer.Option(help="Tokens; default: the preset's.")] = None,
    prefill_workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 3,
    decode_workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
    link: Annotated[
        str, typer.Option(help='Way to the store: unshaped, 100mbit, ... (a relay on loopback), or "none": no store.')
    ] = "unshaped",
    worker_cache: Annotated[
        str | None, typer.Option(help="What each worker keeps of the store's records, e.g. 16MiB; default: nothing.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Everything random follows from it.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """The routing policies on real workers, one process each, with prompts that share documents."""
    from kvferry.deploy.bench_router.real import RouterPlan, bench_real
    from kvferry.deploy.bench_router.results import as_json, print_rounds
    from kvferry.deploy.bench_transfer_lab import parse_link
    from kvferry.deploy.routing.policies import POLICIES
    from kvferry.kvstore.size import parse_size

    try:
        unknown = set(policy or []) - set(POLICIES)
        if unknown:
            raise ValueError(f"no policy {', '.join(sorted(unknown))}: choose of {', '.join(POLICIES)}")
        plan = RouterPlan(
            policies=[name for name in POLICIES if policy is None or name in policy],
            model=model,
            block_size=block_size,
            num_prefill=prefill_workers,
            num_decode=decode_workers,
            num_documents=documents,
            num_requests=requests,
            document_tokens=document_len,
            question_tokens=question_len,
            output_tokens=output_len,
            request_rate=request_rate,
            rounds=rounds,
            seed=seed,
            store=link != "none",
            bits_per_s=None if link == "none" else parse_link(link),
            cache_bytes=None if worker_cache is None else parse_size(worker_cache),
        )
        results = asyncio.run(bench_real(plan, progress=lambda line: print(line, file=sys.stderr, flush=True)))
        title = (
            f"{plan.num_prefill} prefill and {plan.num_decode} decode workers, {plan.num_documents} documents of "
            f"{plan.document_tokens} tokens, {plan.request_rate:g} requests/s, store: {link}, "
            f"cache of a worker: {worker_cache or 'none'}"
        )
        print_rounds(results, title=title)
        if json_path is not None:
            json_path.write_text(json.dumps({"title": title} | as_json(results), indent=2) + "\n")
    except (OSError, RuntimeError, TimeoutError, ValueError) as error:
        fail(str(error))
