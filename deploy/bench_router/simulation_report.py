"""The table of `kvferry bench router --simulate`. Every line of it says that it is simulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kvferry.deploy.bench_router.results import imbalance
from kvferry.deploy.bench_router.simulation import Simulated


def summarize_simulated(result: Simulated) -> dict[str, Any]:
    ttfts, decisions = np.array(result.ttfts_s), np.array(result.decision_s)
    total = sum(result.tokens.values())
    return {
        "simulated": True,
        "policy": result.policy,
        "num_requests": len(ttfts),
        "median_ttft_s": float(np.median(ttfts)),
        "p99_ttft_s": float(np.percentile(ttfts, 99)),
        **{f"{name}_share": count / total for name, count in result.tokens.items()},
        "pool_hit_share": result.pool_hit_share,
        "prefill_work_imbalance": imbalance(result.prefill_work_s),
        "prefill_request_imbalance": imbalance(result.prefill_requests),
        "decode_token_imbalance": imbalance(result.decode_tokens),
        "prefill_work_s": sum(result.prefill_work_s),
        "decision_median_us": 1e6 * float(np.median(decisions)),
        "decision_p99_us": 1e6 * float(np.percentile(decisions, 99)),
        "index_bytes": result.state_bytes,
    }


def print_simulated(rows: Sequence[dict[str, Any]], *, title: str) -> None:
    table = Table(title=f"SIMULATED: {title}", title_justify="left")
    for column in (
        "policy",
        "TTFT p50",
        "p99",
        "own",
        "store",
        "computed",
        "pool hits",
        "prefill work, requests max/mean",
        "decode",
        "decision p50, p99",
        "index",
    ):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        table.add_row(
            row["policy"],
            f"{row['median_ttft_s']:.3f} s",
            f"{row['p99_ttft_s']:.2f} s",
            *(f"{row[f'{name}_share']:.0%}" for name in ("own", "store", "computed", "pool_hit")),
            f"{row['prefill_work_imbalance']:.2f}, {row['prefill_request_imbalance']:.2f}",
            f"{row['decode_token_imbalance']:.2f}",
            f"{row['decision_median_us']:.0f}, {row['decision_p99_us']:.0f} us",
            f"{row['index_bytes'] / 1e6:.1f} MB",
        )
    console = Console(width=130)
    console.print(table)
    console.print("Workers, times and hits are simulated; decision times and the index are measured.", highlight=False)
