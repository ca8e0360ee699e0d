"""A run as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvferry.deploy.bench_serve.measure import Measured
from kvferry.deploy.bench_serve.metrics import Spread, Summary

_SPREADS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
_LESS_NOTED = ("send_lag", "gateway_ttft")
_BUSY_CLIENT = 0.7
_WIDTH = 100


def as_json(summary: Summary) -> dict[str, Any]:
    """Flat, with `vllm bench serve`'s names where they mean the same: `p99_ttft_ms`, `request_throughput`, ..."""
    fields = asdict(summary)
    for name in (*_SPREADS, *_LESS_NOTED):
        value: Spread | None = getattr(summary, name)
        del fields[name]
        for statistic in Spread.__dataclass_fields__:
            fields[f"{statistic}_{name}_ms"] = None if value is None else getattr(value, statistic)
    return fields


def details(requests: list[Measured]) -> list[dict[str, Any]]:
    """One object a request, in the order of the workload; all times in seconds from its sending, but for `sent`."""
    return [
        {
            "kind": request.planned.kind,
            "status": request.status.name,
            "error": request.error,
            "input_len": len(request.planned.token_ids),
            "asked_output_len": request.planned.max_tokens,
            "output_len": request.num_tokens,
            "due": request.due_s,
            "sent": request.sent_s,
            "ended": request.ended_s,
            "ttft": request.ttft_s if request.arrivals_s else None,
            "itls": request.itls_s,
            "usage": None if request.usage is None else asdict(request.usage),
        }
        for request in requests
    ]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Raises OSError."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def print_summary(summary: Summary, *, title: str, client_load: float) -> None:
    """`client_load`: cores that this process kept busy."""
    console = Console(width=_WIDTH, highlight=False)
    console.print(_counts(summary, title))
    console.print(_latencies(summary))
    if any(o.status != "OK" for o in summary.outcomes) or len(summary.outcomes) > 1:
        console.print(_outcomes(summary))
    for outcome in summary.outcomes:
        if not outcome.expected and outcome.error:
            console.print(f"{outcome.kind}, {outcome.status}: {outcome.error}", markup=False)
    if summary.wrong_length:
        console.print(f"Warning: {summary.wrong_length} answers are shorter or longer than asked for.")
    if client_load > _BUSY_CLIENT:
        console.print(f"Warning: this client kept {client_load:.2f} cores busy; its own delays are in the figures.")


def _counts(summary: Summary, title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("requests completed, failed", f"{summary.completed}, {summary.failed}"),
        ("duration", f"{summary.duration:.2f} s"),
        ("prompt, output tokens", f"{summary.total_input_tokens:,}, {summary.total_output_tokens:,}"),
        ("requests/s", f"{summary.request_throughput:.2f}"),
        (
            "output tokens/s; in the best second",
            f"{summary.output_throughput:.1f}; {summary.max_output_tokens_per_s:g}",
        ),
        ("prompt and output tokens/s", f"{summary.total_token_throughput:.1f}"),
        ("most requests at once", str(summary.max_concurrent_requests)),
    ]
    if summary.request_goodput is not None:
        share = "" if summary.slo_attainment is None else f"; {summary.slo_attainment:.1%} of the requests"
        rows.append(("goodput", f"{summary.request_goodput:.2f} requests/s{share}"))
    if summary.cache_hit_rate is not None:
        rows.append(("prompt tokens from the store", f"{summary.cached_tokens:,}: {summary.cache_hit_rate:.1%}"))
    if summary.kv_bytes_ratio is not None:
        text = f"{summary.kv_bytes_moved:,} of {summary.kv_bytes_bf16:,}: {summary.kv_bytes_ratio:.2f}x less"
        rows.append(("KV bytes moved, of bf16's", text))
    for row in rows:
        table.add_row(*row)
    return table


def _latencies(summary: Summary) -> Table:
    table = Table(title="completed requests, ms", title_justify="left")
    statistics = ("mean", "std", "p50", "p90", "p99")
    table.add_column("")
    for name in statistics:
        table.add_column(name, justify="right")
    for name, label in (*_SPREADS.items(), ("send_lag", "sent late")):
        value: Spread | None = getattr(summary, name)
        if value is not None:
            table.add_row(label, *(f"{getattr(value, statistic):.2f}" for statistic in statistics))
    return table


def _outcomes(summary: Summary) -> Table:
    table = Table(title="outcomes", title_justify="left")
    for column in ("kind", "status", "as meant", "requests"):
        table.add_column(column, justify="right" if column == "requests" else "left")
    for outcome in summary.outcomes:
        table.add_row(outcome.kind, outcome.status, "yes" if outcome.expected else "no", str(outcome.count))
    return table
