"""What `kvferry bench router` measures, and its table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class TokenSources:
    """Where the prompts' tokens came from on the prefill workers."""

    total: int
    computed: int
    shared: int
    """Taken from a request that was on the worker at the same time."""
    own_cache: int
    """From the worker's memory of records."""
    store: int

    def share(self, name: str) -> float:
        count: int = getattr(self, name)
        return count / self.total


@dataclass(frozen=True, kw_only=True)
class PolicyRound:
    """One policy's requests of one round; counts by worker."""

    policy: str
    number: int
    ttfts_s: tuple[float, ...]
    prefill_work_s: tuple[float, ...]
    """Spent in passes."""
    prefill_requests: tuple[int, ...]
    decode_requests: tuple[int, ...]
    tokens: TokenSources
    load_average: float

    @property
    def median_ttft_s(self) -> float:
        return statistics.median(self.ttfts_s)


def imbalance(by_worker: Sequence[float]) -> float:
    """The most loaded worker's load over the mean; 1 is even."""
    mean = sum(by_worker) / len(by_worker)
    return max(by_worker) / mean if mean else 1.0


def summarize(rounds: Sequence[PolicyRound]) -> list[dict[str, Any]]:
    """One row a policy, over all its rounds; loads are summed by worker before they are compared."""
    rows = []
    for policy in dict.fromkeys(one.policy for one in rounds):
        own = [one for one in rounds if one.policy == policy]
        ttfts = np.array([ttft for one in own for ttft in one.ttfts_s])
        total = sum(one.tokens.total for one in own)
        rows.append(
            {
                "policy": policy,
                "num_requests": len(ttfts),
                "median_ttft_s": float(np.median(ttfts)),
                "p90_ttft_s": float(np.percentile(ttfts, 90)),
                "p99_ttft_s": float(np.percentile(ttfts, 99)),
                **{
                    f"{name}_share": sum(getattr(one.tokens, name) for one in own) / total
                    for name in ("computed", "shared", "own_cache", "store")
                },
                "prefill_work_imbalance": _summed([one.prefill_work_s for one in own]),
                "prefill_request_imbalance": _summed([one.prefill_requests for one in own]),
                "decode_request_imbalance": _summed([one.decode_requests for one in own]),
                "prefill_work_s": sum(sum(one.prefill_work_s) for one in own),
                "load_average": (min(one.load_average for one in own), max(one.load_average for one in own)),
            }
        )
    return rows


def ratios(rounds: Sequence[PolicyRound], *, of: str, to: str) -> list[float]:
    """Median TTFT of policy `of` over that of `to`, round by round."""
    medians = {(one.policy, one.number): one.median_ttft_s for one in rounds}
    numbers = sorted({one.number for one in rounds})
    return [medians[of, number] / medians[to, number] for number in numbers if (of, number) in medians]


def print_rounds(rounds: Sequence[PolicyRound], *, title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in (
        "policy",
        "TTFT p50",
        "p90",
        "p99",
        "computed",
        "shared",
        "own cache",
        "store",
        "prefill work",
        "work, requests max/mean",
        "decode",
    ):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in summarize(rounds):
        table.add_row(
            row["policy"],
            *(f"{row[f'{name}_ttft_s']:.2f} s" for name in ("median", "p90", "p99")),
            *(f"{row[f'{name}_share']:.0%}" for name in ("computed", "shared", "own_cache", "store")),
            f"{row['prefill_work_s']:.0f} s",
            f"{row['prefill_work_imbalance']:.2f}, {row['prefill_request_imbalance']:.2f}",
            f"{row['decode_request_imbalance']:.2f}",
        )
    console = Console(width=130)
    console.print(table)
    policies = {one.policy for one in rounds}
    if "prefix" in policies:
        for other in sorted(policies - {"prefix"}):
            by_round = ratios(rounds, of=other, to="prefix")
            figures = ", ".join(f"{ratio:.2f}" for ratio in by_round)
            console.print(f"median TTFT of {other} over prefix, by round: {figures}", highlight=False)
    loads = [one.load_average for one in rounds]
    console.print(f"measured; load average {min(loads):.1f} to {max(loads):.1f}", highlight=False)


def as_json(rounds: Sequence[PolicyRound]) -> dict[str, Any]:
    return {"measured": True, "summary": summarize(rounds), "rounds": [asdict(one) for one in rounds]}


def _summed(by_round: Sequence[Sequence[float]]) -> float:
    return imbalance([sum(of_worker) for of_worker in zip(*by_round, strict=True)])
