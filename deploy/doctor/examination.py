"""All examinations in order, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvferry.deploy.doctor.deep import deep_findings
from kvferry.deploy.doctor.disk import disk_findings
from kvferry.deploy.doctor.finding import Finding, problem
from kvferry.deploy.doctor.limits import limit_findings
from kvferry.deploy.doctor.machine import machine_findings
from kvferry.deploy.doctor.model import model_findings
from kvferry.deploy.doctor.ports import port_findings
from kvferry.deploy.doctor.redis_tier import redis_findings
from kvferry.deploy.doctor.software import software_findings
from kvferry.deploy.settings import Settings


def examine(config: Path | None = None, *, deep: bool = False) -> list[Finding]:
    """Everything, in the order of the screen. Takes seconds; with `deep`, the time of loading the model, too."""
    return [*machine_findings(), *software_findings(), *_of_settings(config, deep=deep)]


def _of_settings(config: Path | None, *, deep: bool) -> Iterator[Finding]:
    topic = "settings"
    try:
        settings = Settings.load(config)
    except ValidationError as error:
        for one in error.errors():
            yield problem(topic, ".".join(map(str, one["loc"])), one["msg"])
        return
    except (OSError, ValueError) as error:
        yield problem(topic, "cannot be read", str(error))
        return
    yield Finding(topic, "valid", "the defaults and the environment" if config is None else str(config))
    yield from model_findings(settings)
    yield from port_findings(settings)
    yield from redis_findings(settings)
    yield from disk_findings(settings)
    yield from limit_findings(settings)
    if deep:
        yield from deep_findings(settings)


def as_report(findings: list[Finding]) -> dict[str, Any]:
    """For --json."""
    return {
        "problems": sum(finding.status == "problem" for finding in findings),
        "warnings": sum(finding.status == "warning" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def print_findings(findings: list[Finding]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("", "topic", "found", "why, or what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(*map(Text, (finding.status, finding.topic, finding.value, finding.reason)))
    console = Console(width=120)
    console.print(table)
    report = as_report(findings)
    counts = [_count(report[f"{name}s"], name) for name in ("problem", "warning") if report[f"{name}s"]]
    console.print(f"{', '.join(counts)}." if counts else "No problems, no warnings.")


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' if number != 1 else ''}"
