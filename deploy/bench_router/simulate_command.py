"""What `kvferry bench router --simulate` does."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvferry.deploy.bench_router.simulation import Scenario, simulate
from kvferry.deploy.bench_router.simulation_report import print_simulated, summarize_simulated
from kvferry.deploy.bench_router.synthetic_trace import SyntheticTrace, write_trace
from kvferry.deploy.bench_serve.trace import TraceRow, read_trace
from kvferry.deploy.routing.policies import Policy


@dataclass(frozen=True, kw_only=True)
class SimulatePlan:
    policies: Sequence[Policy]
    scenario: Scenario
    trace: Path | None
    """In Mooncake's format; None: a synthetic one."""
    num_requests: int
    request_rate: float
    """Of the synthetic trace."""
    write_trace: Path | None = None


def run_simulation(plan: SimulatePlan, *, json_path: Path | None, progress: Callable[[str], None]) -> None:
    """Prints the table. Raises OSError or ValueError for a trace that cannot be read or written."""
    rows, what = _rows(plan)
    summaries = []
    for policy in plan.policies:
        summaries.append(summarize_simulated(simulate(policy, rows, plan.scenario)))
        progress(f"simulated {policy}")
    scenario = plan.scenario
    title = (
        f"{scenario.num_prefill} prefill and {scenario.num_decode} decode workers, {scenario.num_gateways} gateway(s), "
        f"{len(rows)} requests of {what}"
    )
    print_simulated(summaries, title=title)
    if json_path is not None:
        json_path.write_text(json.dumps({"simulated": True, "title": title, "summary": summaries}, indent=2) + "\n")


def _rows(plan: SimulatePlan) -> tuple[list[TraceRow], str]:
    if plan.trace is not None:
        if plan.write_trace is not None:
            raise ValueError("--write-trace is for the synthetic trace: leave --trace out")
        return read_trace(plan.trace, limit=plan.num_requests), f"the trace {plan.trace.name}"
    made = SyntheticTrace(num_requests=plan.num_requests, requests_per_s=plan.request_rate, seed=plan.scenario.seed)
    with tempfile.TemporaryDirectory(prefix="kvferry-trace-") as folder:
        path = plan.write_trace or Path(folder) / "synthetic.jsonl"
        write_trace(path, made.rows())
        return read_trace(path), f"a SYNTHETIC trace, {plan.request_rate:g} requests/s"
