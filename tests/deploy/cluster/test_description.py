"""Cluster files: those that are shipped pass Ray's checks, and mistakes are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvferry.deploy.cluster.description import check_description, read_description
from kvferry.deploy.cluster.launcher import ensure_token, ray_environment
from kvferry.deploy.settings import Settings

SHIPPED = Path(__file__).parents[3] / "deploy" / "cluster"
CLUSTERS = ["local", "aws", "gcp"]


def shipped(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    return content


@pytest.mark.parametrize("name", CLUSTERS)
def test_shipped_files_pass_rays_checks(name: str) -> None:
    description = read_description(SHIPPED / f"{name}.yaml")
    assert description.is_local == (name == "local")
    assert description.head_port == 6379


@pytest.mark.parametrize("name", CLUSTERS)
def test_shipped_files_start_the_deployment_last_with_the_token_and_a_closed_dashboard(name: str) -> None:
    raw = shipped(name)
    end, start, run = raw["head_start_ray_commands"]
    assert end == "kvferry end-host 6379"
    assert run == "kvferry run --config ~/kvferry.yaml"
    assert "--dashboard-host=127.0.0.1" in start
    for commands in (raw["head_start_ray_commands"], raw["worker_start_ray_commands"]):
        text = " ".join(commands)
        assert "RAY_AUTH_MODE=token ray start" in text
        assert "ray stop" not in text  # it would end every Ray of the machine
    tokens = {"~/.ray/auth_token", "~/.kvferry/cluster_token", "~/.kvferry/tokens.yaml"}
    assert {"~/kvferry.yaml", *tokens} == raw["file_mounts"].keys()


def test_the_shipped_configuration_is_valid_and_asks_for_the_machines_of_the_shipped_cluster() -> None:
    settings = Settings.load(SHIPPED / "kvferry.yaml")
    assert settings.cluster.machines == 1 + len(shipped("local")["provider"]["worker_ips"])
    assert settings.store.count <= settings.cluster.machines


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            raw = raw[key]
        raw[last] = value

    return change


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("local", _set("setup_command", []), "setup_command"),
        ("local", _set("idle_timeout_minutes", "soon"), "idle_timeout_minutes"),
        ("local", _set("provider", {"type": "local", "head_ip": "10.0.0.1"}), "worker_ips"),
        ("local", _set("provider", {"type": "lokal"}), "lokal"),
        ("local", lambda raw: raw.pop("cluster_name"), "cluster_name is missing"),
        ("aws", _set("head_node_type", "haed"), "head_node_type"),
        ("aws", _set("available_node_types.gpu.min_workers", 99), "max_workers"),
        ("gcp", _set("available_node_types.gpu.resources", {"GPU": "one"}), "one"),
        ("gcp", lambda raw: raw.pop("provider"), "provider is missing"),
    ],
)
def test_mistakes_are_named(name: str, change: Callable[[dict[str, Any]], None], said: str) -> None:
    raw = shipped(name)
    change(raw)
    with pytest.raises(ValueError, match=said):
        check_description(raw, Path("cluster.yaml"))


def test_files_are_looked_for_beside_the_description(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text((SHIPPED / "local.yaml").read_text())
    raw = read_description(path).with_file_mounts({"~/more": "/etc/hostname"})
    assert raw["file_mounts"]["~/kvferry.yaml"] == str(tmp_path / "kvferry.yaml")
    assert raw["file_mounts"]["~/more"] == "/etc/hostname"
    assert raw["file_mounts"]["~/.ray/auth_token"] == str(Path.home() / ".ray" / "auth_token")


def test_only_a_local_cluster_needs_the_first_autoscaler() -> None:
    key = "RAY_UP_enable_autoscaler_v2"
    assert ray_environment(read_description(SHIPPED / "local.yaml"))[key] == "0"
    assert key not in ray_environment(read_description(SHIPPED / "aws.yaml"))


def test_a_token_is_made_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "ray" / "auth_token"
    ensure_token(path)
    token = path.read_text()
    ensure_token(path)
    assert path.read_text() == token and len(token) == 64
    assert path.stat().st_mode & 0o777 == 0o600
