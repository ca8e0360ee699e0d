"""`kvferry up`, `down`, `status`, `logs`, `run`, `scale`, `restart`, `stop`: a deployment on a Ray cluster."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvferry.deploy.cli_config import read_settings
from kvferry.deploy.cli_failure import fail
from kvferry.deploy.cluster.description import ClusterDescription, read_description
from kvferry.deploy.cluster.host_processes import end_ray_processes
from kvferry.deploy.cluster.shell import Shell, ShellError
from kvferry.deploy.security import operator_credentials
from kvferry.deploy.security_settings import CLUSTER_FOLDER, TOKENS_FILE
from kvferry.deploy.settings import Settings
from kvferry.deploy.token_files import CLIENT_TOKEN

HEAD_TIMEOUT_S = 120.0
RESTART_TIMEOUT_S = 6 * 3600.0
"""Of a rolling restart, whose every process has its own bound."""

ClusterArgument = Annotated[Path, typer.Argument(help="The cluster's YAML file, as for ray up; see docs/cluster.md.")]
OptionalCluster = Annotated[
    Path | None, typer.Argument(help="The cluster's YAML file; without it, the Ray cluster of this machine is asked.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML or TOML file; see docs/configuration.md.")]
RayAddress = Annotated[str, typer.Option(help="host:port of the Ray head; auto: the one that this machine belongs to.")]


def add_cluster_commands(app: typer.Typer) -> None:
    app.command("up")(up_command)
    app.command("down")(down_command)
    app.command("status")(status_command)
    app.command("logs")(logs_command)
    app.command("run")(run_command)
    app.command("scale")(scale_command)
    app.command("restart")(restart_command)
    app.command("stop")(stop_command)
    app.command("end-host", hidden=True)(end_host_command)


def up_command(
    cluster: ClusterArgument,
    config: ConfigOption = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the processes once the head is up.")] = 900.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the status as JSON at the end.")] = False,
) -> None:
    """Start Ray and kvferry on every machine of a cluster, and wait until it serves."""
    from kvferry.deploy.cluster.launcher import mounted_config, up

    description = _description(cluster)
    try:
        settings = read_settings(config or mounted_config(description))  # a mistake should not take minutes to show
        status = up(description, settings, config=config, wait_s=wait, progress=_progress)
    except (OSError, ShellError, TimeoutError, ValueError) as error:
        fail(str(error))
    if as_json:
        print(json.dumps(status))
    else:
        _print_status(status)
        gateways = [p["address"] for p in status["processes"] if p["role"] == "gateway"]
        print(f"kvferry serves on {', '.join(gateways)}")
        if settings.security.tokens_file == TOKENS_FILE:
            print(f"clients need a token: --token-file {CLUSTER_FOLDER / CLIENT_TOKEN}, or one of kvferry token new")


def down_command(cluster: ClusterArgument) -> None:
    """End kvferry and Ray on every machine of a cluster; machines that a cloud made are given back."""
    from kvferry.deploy.cluster.launcher import down

    try:
        down(_description(cluster), progress=_progress)
    except (OSError, ShellError) as error:
        fail(str(error))


def status_command(
    cluster: OptionalCluster = None,
    config: ConfigOption = None,
    ray_address: RayAddress = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on one line.")] = False,
) -> None:
    """Say what every process of a cluster is doing; ends non-zero when one is not well."""
    if cluster is not None:
        from kvferry.deploy.cluster.launcher import read_status

        try:
            status = read_status(_description(cluster))
        except ShellError as error:
            fail(str(error))
    else:
        status = _status_here(read_settings(config), ray_address)
    if as_json:
        print(json.dumps(status))
    else:
        _print_status(status)
    if not status["well"]:
        raise SystemExit(1)


def logs_command(
    name: Annotated[str | None, typer.Argument(help="A process, as kvferry status names it; without it, all.")] = None,
    cluster: Annotated[Path | None, typer.Option(help="The cluster's YAML file; without it, this machine's.")] = None,
    config: ConfigOption = None,
    ray_address: RayAddress = "auto",
    lines: Annotated[int, typer.Option(min=1, help="Of each process, from the end.")] = 50,
) -> None:
    """Print the last log lines of a cluster's processes."""
    if cluster is not None:
        _on_head(cluster, f"kvferry logs --config ~/kvferry.yaml --lines {lines} {shlex.quote(name) if name else ''}")
        return
    from kvferry.deploy.cluster import application
    from kvferry.deploy.cluster.logs import log_tails

    try:
        with application.connected(ray_address):
            for title, text in log_tails(read_settings(config).cluster.name, name, lines):
                print(f"==> {title} <==\n{text}")
    except (ConnectionError, LookupError, RuntimeError) as error:
        fail(str(error))


def run_command(
    config: ConfigOption = None,
    ray_address: RayAddress = "auto",
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait until every process is up; 0: do not wait.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="If it runs already, leave it as it is.")] = False,
) -> None:
    """Start kvferry on a Ray cluster that runs; it goes on when this command has ended."""
    from kvferry.deploy.cluster import application

    settings = read_settings(config)
    try:
        with application.connected(ray_address):
            application.start(settings, keep=keep)
            if wait:
                application.wait_until_up(settings.cluster.name, wait)
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
    print(f"deployment {settings.cluster.name} is {'up' if wait else 'starting'}: see kvferry status")


def scale_command(
    cluster: OptionalCluster = None,
    config: ConfigOption = None,
    ray_address: RayAddress = "auto",
    prefill: Annotated[int | None, typer.Option(min=0, help="Prefill workers from now on.")] = None,
    decode: Annotated[int | None, typer.Option(min=1, help="Decode workers from now on.")] = None,
) -> None:
    """Change how many workers a running cluster has. Those with the highest numbers leave.

    Where cluster.autoscale has the role, the number is the least that it has from now on.
    """
    counts = {role: count for role, count in (("prefill", prefill), ("decode", decode)) if count is not None}
    if not counts:
        fail("say how many workers: --prefill N, --decode N")
    if cluster is not None:
        options = " ".join(f"--{role} {count}" for role, count in counts.items())
        _on_head(cluster, f"kvferry scale --config ~/kvferry.yaml {options}")
        return
    from kvferry.deploy.cluster import application

    name = read_settings(config).cluster.name
    try:
        with application.connected(ray_address):
            for role, count in counts.items():
                application.scale(name, role, count)
    except (ConnectionError, RuntimeError, ValueError) as error:
        fail(str(error))


def restart_command(
    cluster: OptionalCluster = None,
    config: ConfigOption = None,
    ray_address: RayAddress = "auto",
    only: Annotated[
        list[str] | None, typer.Option(help="A role or a process, as kvferry status names it; may be repeated.")
    ] = None,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds that a process's running requests get.")] = 60.0,
    wait: Annotated[float, typer.Option(min=1, help="Seconds until a process must be back, draining included.")] = 600,
    interrupt: Annotated[
        bool, typer.Option("--interrupt", help="Also what has no stand-in: its requests fail meanwhile.")
    ] = False,
) -> None:
    """Restart a cluster's processes one after the other, each when the one before is used again."""
    if cluster is not None:
        options = [f"--only {shlex.quote(name)}" for name in only or ()]
        options += [f"--drain-timeout {drain_timeout}", f"--wait {wait}", *(["--interrupt"] if interrupt else [])]
        _progress("restarting one process after the other (each takes as long as a start)")
        command = f"kvferry restart --config ~/kvferry.yaml {' '.join(options)}"
        _on_head(cluster, command, timeout_s=RESTART_TIMEOUT_S)
        return
    from kvferry.deploy.cluster import application
    from kvferry.deploy.cluster.rolling import rolling_restart

    settings = read_settings(config)
    name = settings.cluster.name
    try:
        with application.connected(ray_address):
            count = rolling_restart(
                lambda: application.members(name),
                lambda process: application.restart(name, process, drain_timeout),
                only=only or (),
                directory=settings.cluster.directory,
                credentials=operator_credentials(settings.security),
                wait_s=wait,
                may_interrupt=interrupt,
                progress=lambda line: print(line, flush=True),
            )
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
    print(f"{count} processes were restarted")


def stop_command(config: ConfigOption = None, ray_address: RayAddress = "auto") -> None:
    """End kvferry on a Ray cluster; Ray goes on."""
    from kvferry.deploy.cluster import application

    try:
        with application.connected(ray_address):
            application.stop(read_settings(config).cluster.name)
    except (ConnectionError, RuntimeError) as error:
        fail(str(error))


def end_host_command(
    address: Annotated[str, typer.Argument(help="host:port of the Ray head, or the port alone on the head.")],
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """End the processes of one Ray cluster on this machine."""
    try:
        ended = end_ray_processes(address if ":" in address else f":{address}")
    except PermissionError as error:
        fail(f"a process of the cluster belongs to another user: {error}")
    print(json.dumps({"ended": ended}) if as_json else f"{len(ended)} processes ended")


def _on_head(cluster: Path, command: str, *, timeout_s: float = HEAD_TIMEOUT_S) -> None:
    """Runs a command on the head and prints what it prints; ends with its error."""
    try:
        done = Shell(_description(cluster)).on_head(command, timeout_s=timeout_s)
    except ShellError as error:
        fail(str(error))
    sys.stdout.write(done.output)
    if done.returncode:
        fail(done.said)


def _status_here(settings: Settings, ray_address: str) -> dict[str, Any]:
    from kvferry.deploy.cluster import application
    from kvferry.deploy.cluster.status import as_json, gather

    name = settings.cluster.name
    try:
        credentials = operator_credentials(settings.security)
        with application.connected(ray_address):
            states, scaling = application.members(name), application.scaling(name)
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
    return as_json(name, asyncio.run(gather(states, credentials)), scaling)


def _print_status(status: dict[str, Any]) -> None:
    from kvferry.deploy.cluster.autoscaler import RoleScaling
    from kvferry.deploy.cluster.status import ProcessStatus, print_table

    processes = [ProcessStatus(**process) for process in status["processes"]]
    print_table(status["name"], processes, [RoleScaling(**role) for role in status["scaling"]])


def _description(path: Path) -> ClusterDescription:
    try:
        return read_description(path)
    except (OSError, ValueError) as error:
        fail(str(error))


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
