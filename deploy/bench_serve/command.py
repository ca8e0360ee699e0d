"""The options of `kvferry bench serve`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from kvferry.deploy.cli_access import (
    CaOption,
    SecurityConfigOption,
    TokenFileOption,
    client_access,
    peers_of,
)
from kvferry.deploy.cli_failure import fail
from kvferry.deploy.client import DEFAULT_ADDRESS, ClientError
from kvferry.proto.peer_security import PeerSecurity


def bench_serve_command(
    address: Annotated[str, typer.Option(help="host:port of the gateway.")] = DEFAULT_ADDRESS,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    config: SecurityConfigOption = None,
    model: Annotated[str | None, typer.Option(help="Name of the served model; else whatever is served.")] = None,
    workload: Annotated[str, typer.Option(help="unique, shared-prefix, trace or mixed.")] = "unique",
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Requests; default 100, of a trace all.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Everything random follows from it.")] = 0,
    request_rate: Annotated[
        float, typer.Option(help="Open loop: requests a second, as a Poisson process; inf: all at once.")
    ] = float("inf"),
    burstiness: Annotated[float, typer.Option(help="Shape of the gaps' gamma distribution; 1: Poisson.")] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: at most so many requests at once.")
    ] = None,
    num_warmups: Annotated[int, typer.Option(min=0, help="Requests before the run, one by one, not counted.")] = 0,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt: unique, mixed.")] = 512,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer; end tokens are ignored.")] = 64,
    range_ratio: Annotated[
        float, typer.Option(help="Lengths are uniform in length * (1 - ratio) to length * (1 + ratio).")
    ] = 0.0,
    prefix_len: Annotated[int, typer.Option(min=1, help="shared-prefix: tokens of a prefix.")] = 1024,
    num_prefixes: Annotated[int, typer.Option(min=1, help="shared-prefix: how many prefixes.")] = 4,
    suffix_len: Annotated[int, typer.Option(min=1, help="shared-prefix: tokens after the prefix.")] = 64,
    trace: Annotated[Path | None, typer.Option(help="A trace in Mooncake's format, one JSON object a line.")] = None,
    trace_speed: Annotated[float, typer.Option(help="2: twice as fast as it was.")] = 1.0,
    trace_block: Annotated[
        int, typer.Option(help="Tokens of a trace's block. Below 512 all its lengths shrink in proportion.")
    ] = 512,
    long_input_len: Annotated[int, typer.Option(min=1, help="mixed: tokens of a long prompt.")] = 2048,
    long_share: Annotated[float, typer.Option(min=0, max=1, help="mixed: share of long prompts.")] = 0.2,
    cancel_share: Annotated[float, typer.Option(min=0, max=1, help="mixed: share that the client leaves.")] = 0.1,
    deadline_share: Annotated[
        float, typer.Option(min=0, max=1, help="mixed: share of long prompts with too short a deadline.")
    ] = 0.1,
    bad_share: Annotated[float, typer.Option(min=0, max=1, help="mixed: share that must be refused.")] = 0.1,
    short_deadline: Annotated[float, typer.Option(min=0.001, help="mixed: the too short deadline, seconds.")] = 0.05,
    goodput: Annotated[
        list[str] | None, typer.Option(help="Targets in ms, e.g. 'ttft:500 tpot:80'; also e2el. May be repeated.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Deadline of a request, seconds.")] = 600.0,
    vocab_size: Annotated[int, typer.Option(min=2, help="Prompts are made of token ids below this.")] = 10_000,
    worker: Annotated[
        list[str] | None, typer.Option(help="host:port of a decode worker whose block pool to watch. May be repeated.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    details: Annotated[bool, typer.Option("--details", help="With --json: every request, too.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Also draw PNG plots into this folder; needs matplotlib.")] = None,
) -> None:
    """Load on a running gateway: latencies at the client, throughput, goodput, cache hits, bytes moved.

    Ends non-zero if no request completed. The same seed sends the same prompts, which the store then has: take another
    one for a cold run.
    """
    from kvferry.deploy.bench_serve.bench import ServeBench, bench_serve
    from kvferry.deploy.bench_serve.metrics import parse_slo
    from kvferry.deploy.bench_serve.mixed import Mix
    from kvferry.deploy.plotting import require_matplotlib

    try:
        if details and json_path is None:
            raise ValueError("--details go into the file of --json")
        if json_path is not None and not json_path.parent.is_dir():
            raise ValueError(f"--json {json_path}: there is no folder {json_path.parent}")
        if plots is not None:
            require_matplotlib()  # before minutes of measuring, not after them
            plots.mkdir(parents=True, exist_ok=True)
        bench = ServeBench(
            address=address,
            access=client_access(token_file, ca),
            peers=peers_of(config) if worker else PeerSecurity(),
            model=model,
            workload=workload,
            num_prompts=num_prompts,
            seed=seed,
            request_rate=request_rate,
            burstiness=burstiness,
            max_concurrency=max_concurrency,
            num_warmups=num_warmups,
            input_len=input_len,
            output_len=output_len,
            range_ratio=range_ratio,
            prefix_len=prefix_len,
            num_prefixes=num_prefixes,
            suffix_len=suffix_len,
            trace=trace,
            trace_speed=trace_speed,
            trace_block=trace_block,
            long_input_len=long_input_len,
            mix=Mix(long=long_share, cancelled=cancel_share, too_short_deadline=deadline_share, bad=bad_share),
            short_deadline_s=short_deadline,
            slo=parse_slo(goodput or []),
            timeout_s=timeout,
            vocab_size=vocab_size,
            workers=tuple(worker or ()),
        )
        completed = asyncio.run(bench_serve(bench, json_path=json_path, with_details=details, plots=plots))
    except (OSError, ValueError, ClientError) as error:
        fail(str(error))
    if not completed:
        fail("no request completed")
