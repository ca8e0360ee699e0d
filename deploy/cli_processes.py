"""`kvferry directory|worker|gateway|store|members`: one process each, which find each other through the directory."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from kvferry.deploy.cli_failure import fail
from kvferry.deploy.settings import Settings
from kvferry.proto.peer_security import PeerSecurity

ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML or TOML file; see docs/configuration.md.")]
DirectoryOption = Annotated[str, typer.Option(help="host:port of the directory.")]
AdvertiseOption = Annotated[str | None, typer.Option(help="Host name or address at which the others reach this one.")]
DrainOption = Annotated[float, typer.Option(min=0.0, help="Seconds that running requests get after SIGTERM.")]
ModelArgument = Annotated[
    str | None, typer.Argument(help='Hugging Face folder, .gguf file, hub id, or "demo"; the same for all.')
]
HostOption = Annotated[str, typer.Option(help="Address to bind.")]

DEFAULT_DIRECTORY = "127.0.0.1:7590"
DRAIN_TIMEOUT_S = 30.0


class WorkerRole(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (directory, worker, gateway, store, members):
        app.command()(command)


def directory(
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port.")] = 7590,
    state: Annotated[
        Path | None, typer.Option(help="File that keeps epochs growing when the wall clock is set back.")
    ] = None,
    lease: Annotated[float, typer.Option(help="Seconds after which a silent member is taken off.")] = 2.8,
    config: ConfigOption = None,
) -> None:
    """Run the directory, which tells workers, store nodes and gateways of each other. Of the configuration it needs the
    metrics and security sections only."""
    settings = _settings(config)
    from kvferry.deploy.cluster_member import ClusterMember, run_until_signal
    from kvferry.deploy.directory_server import DirectoryConfig, DirectoryServer

    security = _security(settings)

    async def serve() -> None:
        place = DirectoryConfig(host=host, port=port, lease_s=lease, state=state, metrics=settings.metrics.place(port))
        server = DirectoryServer(place, security=security)
        await run_until_signal(ClusterMember(server, directory=None, roles=()), "directory", drain_timeout_s=0)

    _run(serve())


def worker(
    model: ModelArgument = None,
    role: Annotated[WorkerRole, typer.Option(help="What it does.")] = WorkerRole.BOTH,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    config: ConfigOption = None,
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port.")] = 0,
    advertise: AdvertiseOption = None,
    threads: Annotated[int | None, typer.Option(min=0, help="0: one a core.")] = None,
    drain_timeout: DrainOption = DRAIN_TIMEOUT_S,
) -> None:
    """Run one prefill or decode worker; SIGTERM drains it."""
    settings = _settings(config, model=model, threads=threads)
    from kvferry.deploy.cluster_member import run_until_signal
    from kvferry.deploy.processes import worker_member

    async def serve() -> None:
        member = worker_member(
            settings, role.value, directory=directory, host=host, port=port, advertise_host=advertise
        )
        await run_until_signal(member, f"{role.value} worker", drain_timeout_s=drain_timeout)

    _run(serve())


def gateway(
    model: ModelArgument = None,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Address to bind.")] = None,
    port: Annotated[int | None, typer.Option(help="0: any free port.")] = None,
    advertise: AdvertiseOption = None,
    drain_timeout: DrainOption = DRAIN_TIMEOUT_S,
) -> None:
    """Run one gateway; run several, all are equal. SIGTERM drains it."""
    settings = _settings(config, model=model, gateway={"host": host, "port": port})
    from kvferry.deploy.cluster_member import run_until_signal
    from kvferry.deploy.processes import gateway_member

    async def serve() -> None:
        member = gateway_member(settings, directory=directory, advertise_host=advertise)
        await run_until_signal(member, "gateway", drain_timeout_s=drain_timeout)

    _run(serve())


def store(
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    config: ConfigOption = None,
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port.")] = 0,
    memory: Annotated[str | None, typer.Option(help="Memory tier, e.g. 4GiB.")] = None,
    advertise: AdvertiseOption = None,
    drain_timeout: DrainOption = DRAIN_TIMEOUT_S,
) -> None:
    """Run one KV store node; SIGTERM drains it."""
    settings = _settings(config, store={"memory": memory})
    from kvferry.deploy.cluster_member import run_until_signal
    from kvferry.deploy.store_process import store_member

    async def serve() -> None:
        member = store_member(settings, directory=directory, host=host, port=port, advertise_host=advertise)
        await run_until_signal(member, "store node", drain_timeout_s=drain_timeout)

    _run(serve())


def members(
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    targets: Annotated[
        bool, typer.Option("--targets", help="Print where each tells its metrics, for Prometheus' file_sd_configs.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """List who is in the directory. Of `--config` its security section is needed, and with --targets its
    metrics section."""
    from kvferry.deploy.directory_client import list_members
    from kvferry.deploy.scrape_targets import scrape_targets

    settings = _settings(config)
    try:
        known = asyncio.run(list_members(directory, security=_security(settings)))
    except (OSError, ValueError) as error:
        fail(str(error))
    if targets:
        offset = settings.metrics.port_offset
        print(json.dumps(scrape_targets(directory, known, port_offset=offset), indent=2))
        return
    if as_json:
        print(json.dumps({"members": [asdict(member) for member in known.members]}))
        return
    for member in known.members:
        print(f"{'+'.join(member.roles):<16} {member.address:<24} epoch {member.epoch}")


def _run(serving: Coroutine[Any, Any, None]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        asyncio.run(serving)
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))


def _security(settings: Settings) -> PeerSecurity:
    from kvferry.deploy.security import peer_security

    try:
        return peer_security(settings.security)
    except (OSError, ValueError) as error:
        fail(str(error))


def _settings(path: Path | None, **options: Any) -> Settings:
    given = {
        key: {inner: x for inner, x in value.items() if x is not None} or None if isinstance(value, dict) else value
        for key, value in options.items()
    }
    try:
        return Settings.load(path, **given)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        fail("the configuration is not valid:\n  " + "\n  ".join(lines))
    except (OSError, ValueError) as error:
        fail(str(error))
