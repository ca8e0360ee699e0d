"""The options of `kvferry bench router`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.deploy.cli_failure import fail

if TYPE_CHECKING:
    from kvferry.deploy.bench_router.real import RouterPlan
    from kvferry.deploy.routing.policies import Policy

REAL_REQUESTS, REAL_RATE = 30, 1.5
SIMULATED_REQUESTS, SIMULATED_RATE = 2000, 8.0


def bench_router_command(
    policy: Annotated[
        list[str] | None, typer.Option(help="prefix, least-loaded or round-robin; may be repeated. Default: all.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help='Hugging Face folder, .gguf file, hub id, or "demo".')] = "demo",
    documents: Annotated[int, typer.Option(min=1, help="Shared beginnings, new ones in each round.")] = 5,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Of each policy in each round; default 30, simulated 2000.")
    ] = None,
    document_len: Annotated[int, typer.Option(min=2, help="Tokens of a document.")] = 1024,
    question_len: Annotated[int, typer.Option(min=1, help="Tokens after it.")] = 24,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 4,
    request_rate: Annotated[
        float | None, typer.Option(min=0.01, help="Requests a second, a Poisson process; default 1.5, simulated 8.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="The policies take turns, round by round.")] = 3,
    block_size: Annotated[int | None, typer.Option(help="Tokens; default: the preset's.")] = None,
    prefill_workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each, or simulated.")] = 3,
    decode_workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each, or simulated.")] = 2,
    link: Annotated[
        str, typer.Option(help='Way to the store: unshaped, 100mbit, ... (a relay on loopback), or "none": no store.')
    ] = "unshaped",
    worker_cache: Annotated[
        str | None, typer.Option(help="What each worker keeps of the store's records, e.g. 16MiB; default: nothing.")
    ] = None,
    simulated: Annotated[
        bool, typer.Option("--simulate", help="No workers: a simulation in virtual time, with the real routers.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="simulate: a trace in Mooncake's format; default: a synthetic one.")
    ] = None,
    write_trace: Annotated[Path | None, typer.Option(help="simulate: also write the synthetic trace here.")] = None,
    gateways: Annotated[int, typer.Option(min=1, help="simulate: gateways that know nothing of each other.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Everything random follows from it.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """The routing policies on real workers, one process each, with prompts that share documents; or simulated."""
    from kvferry.deploy.bench_router.real import RouterPlan
    from kvferry.deploy.bench_router.simulate_command import SimulatePlan, run_simulation
    from kvferry.deploy.bench_router.simulation import Scenario
    from kvferry.deploy.bench_transfer_lab import parse_link
    from kvferry.kvstore.size import parse_size

    try:
        policies = _policies(policy)
        if not simulated and (trace or write_trace or gateways > 1):
            raise ValueError("--trace, --write-trace and --gateways go with --simulate")
        if simulated:
            scenario = Scenario(
                num_prefill=prefill_workers, num_decode=decode_workers, num_gateways=gateways, seed=seed
            )
            simulation = SimulatePlan(
                policies=policies,
                scenario=scenario,
                trace=trace,
                num_requests=requests or SIMULATED_REQUESTS,
                request_rate=request_rate or SIMULATED_RATE,
                write_trace=write_trace,
            )
            run_simulation(simulation, json_path=json_path, progress=_progress)
            return
        plan = RouterPlan(
            policies=policies,
            model=model,
            block_size=block_size,
            num_prefill=prefill_workers,
            num_decode=decode_workers,
            num_documents=documents,
            num_requests=requests or REAL_REQUESTS,
            document_tokens=document_len,
            question_tokens=question_len,
            output_tokens=output_len,
            request_rate=request_rate or REAL_RATE,
            rounds=rounds,
            seed=seed,
            store=link != "none",
            bits_per_s=None if link == "none" else parse_link(link),
            cache_bytes=None if worker_cache is None else parse_size(worker_cache),
        )
        _real(plan, about=f"store: {link}, cache of a worker: {worker_cache or 'none'}", json_path=json_path)
    except (OSError, RuntimeError, TimeoutError, ValueError) as error:
        fail(str(error))


def _real(plan: RouterPlan, *, about: str, json_path: Path | None) -> None:
    from kvferry.deploy.bench_router.real import bench_real
    from kvferry.deploy.bench_router.results import as_json, print_rounds

    results = asyncio.run(bench_real(plan, progress=_progress))
    title = (
        f"{plan.num_prefill} prefill and {plan.num_decode} decode workers, {plan.num_documents} documents of "
        f"{plan.document_tokens} tokens, {plan.request_rate:g} requests/s, {about}"
    )
    print_rounds(results, title=title)
    if json_path is not None:
        json_path.write_text(json.dumps({"title": title} | as_json(results), indent=2) + "\n")


def _policies(names: Sequence[str] | None) -> list[Policy]:
    from kvferry.deploy.routing.policies import POLICIES

    unknown = set(names or []) - set(POLICIES)
    if unknown:
        raise ValueError(f"no policy {', '.join(sorted(unknown))}: choose of {', '.join(POLICIES)}")
    return [name for name in POLICIES if not names or name in names]


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
