"""`kvferry doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def doctor_command(
    config: Annotated[
        Path | None, typer.Option("--config", help="Examine for these settings, not the defaults.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Load the model, too, as a worker does at its start.")] = False,
) -> None:
    """Say what would run on this machine and why, and what goes wrong: versions, kernels, ports, Redis, disk, limits.

    Changes nothing. Ends with 1 where there is a problem; a warning is something slow or unavailable.
    """
    from kvferry.deploy.doctor.examination import as_report, examine, print_findings

    findings = examine(config, deep=deep)
    if as_json:
        print(json.dumps(as_report(findings), indent=2))
    else:
        print_findings(findings)
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)
