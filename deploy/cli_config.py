"""`kvferry config check` and `kvferry config schema`: the settings, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from kvferry.deploy.cli_failure import fail
from kvferry.deploy.security_settings import SecuritySettings
from kvferry.deploy.settings import Settings
from kvferry.proto.peer_security import is_loopback

config = typer.Typer(help="Check a configuration file, or print the schema of its keys.", no_args_is_help=True)


@config.command("check")
def check_command(
    path: Annotated[Path, typer.Argument(help="YAML or TOML file; see docs/configuration.md.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what a file, together with the environment, comes to. Ends non-zero when it is not valid."""
    settings = read_settings(path)
    values = effective_values(settings)
    warnings = find_warnings(settings)
    if as_json:
        print(json.dumps({"warnings": warnings, "settings": values}, indent=2))
        return
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
    for warning in warnings:
        print(f"# warning: {warning}")


@config.command("schema")
def schema_command() -> None:
    """Print the JSON schema of a configuration file."""
    print(json.dumps(Settings.model_json_schema(), indent=2))


def read_settings(path: Path | None) -> Settings:
    """The settings of a file and the environment; ends the command, naming each wrong key."""
    try:
        return Settings.load(path)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        fail("the configuration is not valid:\n  " + "\n  ".join(lines))
    except (OSError, ValueError) as error:
        fail(str(error))


def effective_values(settings: Settings) -> dict[str, Any]:
    """Every key with its value, defaults included; secrets are hidden."""
    return settings.model_dump(mode="json")


def find_warnings(settings: Settings) -> list[str]:
    """What is valid, and yet may not be what is meant."""
    found = []
    cluster = settings.cluster
    is_cluster = cluster.bind == "machine" or cluster.machines > 1
    security = settings.security
    if cluster.bind == "machine" and security.tls is None:
        found.append(
            "cluster.bind: machine sends prompts and blocks over the machines' network in plain text; see security.tls"
        )
    if security.insecure:
        found.append("security.insecure: ports on any address serve everybody who reaches them")
    if cluster.machines > 1 and cluster.bind == "loopback":
        found.append("cluster.bind: loopback cannot join several machines: kvferry run will refuse; set it to machine")
    if is_cluster and settings.store.count > cluster.machines:
        found.append("store.count: more store nodes than cluster.machines; each machine takes one")
    if is_cluster and settings.gateway.count > cluster.machines:
        found.append("gateway.count: more gateways than cluster.machines; each machine takes one")
    if not is_cluster and settings.gateway.count != 1:
        found.append("gateway.count: kvferry serve has one gateway, and refuses other numbers")
    for section in ("gateway", "store", "prefill", "decode"):
        host = getattr(settings, section).host
        if not is_loopback(host):
            found.extend(_of_open_host(section, host, security))
    if settings.store.nodes and settings.store.replication == 1 and len(settings.store.nodes) > 1:
        found.append("store.replication: 1 copy: what a lost node had is computed again")
    prefill, decode = settings.prefill, settings.decode
    ranges = [
        range(section.port, section.port + max(section.count, 0 if scaled is None else scaled.max))
        for section, scaled in ((prefill, cluster.autoscale.prefill), (decode, cluster.autoscale.decode))
    ]
    if prefill.port and decode.port and set(ranges[0]) & set(ranges[1]):
        found.append("prefill.port and decode.port: their ranges of ports overlap")
    return found


def _of_open_host(section: str, host: str, security: SecuritySettings) -> list[str]:
    """What others may do who reach this section's port."""
    tls = security.tls
    if section == "gateway":
        is_open = security.tokens_file is None and (tls is None or not tls.require_client_cert)
        needed = "security.tokens_file"
    else:
        is_open = security.cluster_token_file is None and tls is None
        needed = "security.cluster_token_file"
    if is_open and not security.insecure:
        return [f"{section}.host: {host} may be reached by others, so the start will be refused: set {needed}"]
    return [] if tls is not None else [f"{section}.host: {host} may be reached by others, in plain text"]
