"""`kvferry bench store`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvferry.deploy.cli_failure import fail
from kvferry.kvstore.size import parse_size

DEFAULT_SIZES = ("64KB", "500KB", "1MB", "3MB")


def bench_store_command(
    record_size: Annotated[
        list[str] | None, typer.Option(help="Size of a record, e.g. 1MB; may be repeated. Default: 64KB to 3MB.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each contender.")] = 7,
    round_size: Annotated[str, typer.Option(help="Bytes that a contender moves in a round.")] = "64MB",
    redis_server: Annotated[
        Path | None, typer.Option(help="Redis or Valkey server to start; else one on the path, if any.")
    ] = None,
    peer_python: Annotated[
        Path | None,
        typer.Option(help="Also measure a peer: a Python that has mooncake-transfer-engine-non-cuda installed."),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Records through a store node (memory, disk, Redis) against a plain socket and redis-py, in one run."""
    from kvferry.deploy.bench_store import bench_store, print_store_rates
    from kvferry.kvstore.errors import KVStoreError

    try:
        results = bench_store(
            record_bytes=[parse_size(size) for size in record_size or DEFAULT_SIZES],
            rounds=rounds,
            bytes_a_round=parse_size(round_size),
            redis_server=None if redis_server is None else str(redis_server),
            peer_python=peer_python,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
        print_store_rates(results)
        if json_path is not None:
            json_path.write_text(json.dumps(results.as_json(), indent=2) + "\n")
    except (OSError, RuntimeError, ValueError, KVStoreError) as error:
        fail(str(error))
