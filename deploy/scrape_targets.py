"""Where the processes of a deployment tell their metrics, as Prometheus reads it from a file (file_sd_configs)."""

from __future__ import annotations

from typing import Any

from kvferry.deploy.members import Members


def scrape_targets(directory: str, members: Members, *, port_offset: int) -> list[dict[str, Any]]:
    """The targets of each job: kvferry-directory, kvferry-gateway, … A worker with both roles is in kvferry-both.

    Members whose gRPC port plus `port_offset` is no port have no metrics and are left out.
    """
    jobs: dict[str, list[str]] = {}
    known = [("directory", directory)]
    known += [("both" if len(member.roles) > 1 else member.roles[0], member.address) for member in members.members]
    for job, address in known:
        host, _, port = address.rpartition(":")
        if 0 < int(port) + port_offset <= 65535:
            jobs.setdefault(job, []).append(f"{host}:{int(port) + port_offset}")
    return [{"targets": targets, "labels": {"job": f"kvferry-{job}"}} for job, targets in jobs.items()]
