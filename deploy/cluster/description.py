"""A cluster's YAML file for `ray up`: read and checked by Ray's own rules, before anything starts."""

from __future__ import annotations

import copy
import io
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEFAULT_PORT = 6379


@dataclass(frozen=True, kw_only=True)
class ClusterDescription:
    """What such a file says. `raw` is the file's content, unchanged."""

    path: Path
    raw: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.raw["cluster_name"])

    @property
    def is_local(self) -> bool:
        """Whether it lists machines that are there, instead of having a cloud make them."""
        return bool(self.raw["provider"]["type"] == "local")

    @property
    def head(self) -> str:
        """Of a local cluster."""
        return str(self.raw["provider"]["head_ip"])

    @property
    def workers(self) -> list[str]:
        """Of a local cluster."""
        return [str(ip) for ip in self.raw["provider"]["worker_ips"]]

    @property
    def head_port(self) -> int:
        """The port of Ray's head, from the command that starts it."""
        for command in self.raw.get("head_start_ray_commands", []):
            if "--head" in command and (match := re.search(r"--port[= ](\d+)", command)):
                return int(match[1])
        return DEFAULT_PORT

    def with_file_mounts(self, mounts: dict[str, str]) -> dict[str, Any]:
        """The content with these mounts, its own ones made independent of the folder that `ray up` runs in."""
        raw = copy.deepcopy(self.raw)
        own = {remote: str(self._absolute(local)) for remote, local in (raw.get("file_mounts") or {}).items()}
        raw["file_mounts"] = own | mounts
        key = raw.get("auth", {}).get("ssh_private_key")
        if key is not None:
            raw["auth"]["ssh_private_key"] = str(self._absolute(key))
        return raw

    def _absolute(self, path: str) -> Path:
        expanded = Path(path).expanduser()
        return expanded if expanded.is_absolute() else (self.path.parent / expanded).absolute()


def read_description(path: Path) -> ClusterDescription:
    """Reads and checks a file. Raises ValueError, naming file and key; OSError when it cannot be read."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a cluster description: see deploy/cluster/local.yaml")
    check_description(raw, path)
    return ClusterDescription(path=path, raw=raw)


def check_description(raw: dict[str, Any], path: Path) -> None:
    """Ray's checks: its JSON schema on the content, then on what it makes of it. Free-form parts, such as a cloud's
    `node_config`, are not looked into. Raises ValueError."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    for key in ("cluster_name", "provider"):
        if key not in raw:
            raise ValueError(f"{path}: {key} is missing")
    try:
        # Before Ray fills in its defaults, too: doing so stumbles over wrong types.
        validate_config({"cluster_synced_files": [], **raw})
        if raw["provider"].get("type") == "local" and not {"head_ip", "worker_ips"} <= raw["provider"].keys():
            raise ValueError("provider: a local cluster needs head_ip and worker_ips")
        with redirect_stdout(io.StringIO()):  # remarks about Docker, where there is none
            prepared = prepare_config(copy.deepcopy(raw))
        validate_config(prepared)
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path)) or "the file"
        raise ValueError(f"{path}: {where}: {error.message}") from error
    except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"{path}: {error}") from error
