"""PNG plots of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvferry.deploy.bench_serve.measure import Measured
from kvferry.deploy.bench_serve.metrics import Slo, concurrency, tokens_by_second


def draw_plots(folder: Path, requests: Sequence[Measured], *, slo: Slo, title: str) -> list[Path]:
    """Into an existing folder. Needs matplotlib. Raises OSError."""
    return [_latencies(folder, requests, slo, title), _timeline(folder, requests, title)]


def _latencies(folder: Path, requests: Sequence[Measured], slo: Slo, title: str) -> Path:
    """The share of completed requests (of gaps, for ITL) within a latency."""
    from matplotlib.figure import Figure

    done = [r for r in requests if r.completed]
    panels = (
        ("TTFT", [r.ttft_s for r in done], slo.ttft),
        ("TPOT", [tpot for r in done if (tpot := r.tpot_s) is not None], slo.tpot),
        ("ITL", [gap for r in done for gap in r.itls_s], None),
        ("E2E", [r.e2e_s for r in done], slo.e2el),
    )
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    row = figure.subplots(1, len(panels))
    row[0].set_ylabel("share")
    for axes, (name, seconds, target) in zip(row, panels, strict=True):
        values = sorted(1000 * x for x in seconds)
        axes.step(values, [(i + 1) / len(values) for i in range(len(values))], where="post")
        if target is not None:
            axes.axvline(target, color="tab:red", linestyle="--", label=f"target {target:g} ms")
            axes.legend(fontsize=8)
        axes.set(xlabel=f"{name}, ms", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    path = folder / "serve-latency.png"
    figure.savefig(path, dpi=120)
    return path


def _timeline(folder: Path, requests: Sequence[Measured], title: str) -> Path:
    """Requests running and tokens arriving, over the run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = concurrency(requests)
    above.step([at for at, _ in steps], [running for _, running in steps], where="post")
    above.set_ylabel("requests running")
    by_second = tokens_by_second(requests)
    below.stairs(by_second, list(range(len(by_second) + 1)), fill=True)
    below.set(xlabel="seconds", ylabel="output tokens/s")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    path = folder / "serve-timeline.png"
    figure.savefig(path, dpi=120)
    return path
