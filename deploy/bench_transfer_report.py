"""How the figures of `kvferry bench transfer` are shown."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvferry.deploy.bench_transfer import TransferCase, TransferResults
from kvferry.deploy.plotting import require_matplotlib


def print_transfer(results: TransferResults) -> None:
    """Two tables: hits, and hand-overs."""
    plan = results.plan
    console = Console(width=160)
    hits = Table(
        title=f"Hits on another machine, {plan.preset} against fp16 blocks: TTFT and fetch in s, MB on the wire"
    )
    ttft = ("packed", "bf16", "recompute")
    wire = ("fetch packed", "fetch bf16", "less time", "MB packed", "MB bf16", "fewer bytes")
    for heading in ("link", "path", "tokens", *ttft, *wire):
        hits.add_column(heading, justify="left" if heading in ("link", "path") else "right")
    for case in results.cases:
        hits.add_row(
            case.link,
            case.path,
            str(case.prompt_tokens),
            _seconds(case.ttft_packed_s),
            _seconds(case.ttft_bf16_s),
            _seconds(case.ttft_recompute_s),
            _seconds(case.fetch_packed_s),
            _seconds(case.fetch_bf16_s),
            _ratio(case.fetch_bf16_s, case.fetch_packed_s),
            _megabytes(case.wire_bytes_packed),
            _megabytes(case.wire_bytes_bf16),
            _ratio(case.wire_bytes_bf16, case.wire_bytes_packed),
        )
    console.print(hits)
    handovers = Table(title=f"Hand-over of a prompt that is computed, {plan.output_tokens} tokens of answer: s")
    headings = ("exposed", "unstreamed", "share", "via store", "exposed bf16", "JCT packed", "JCT bf16", "ratio")
    for heading in ("link", "tokens", *headings):
        handovers.add_column(heading, justify="left" if heading == "link" else "right")
    for case in _by_link(results.cases):
        handovers.add_row(
            case.link,
            str(case.prompt_tokens),
            f"{case.exposed_s:.4f}",
            f"{case.unstreamed_s:.4f}",
            f"{case.exposed_s / case.unstreamed_s:.1%}" if case.unstreamed_s else "-",
            "-" if case.exposed_store_s is None else f"{case.exposed_store_s:.4f}",
            f"{case.exposed_bf16_s:.4f}",
            _seconds(case.jct_packed_s),
            _seconds(case.jct_bf16_s),
            f"{case.jct_packed_s / case.jct_bf16_s:.2f}x",
        )
    console.print(handovers)
    print(
        f"medians of {plan.rounds} rounds; {results.cores} cores, load {results.load_before:.1f} before and "
        f"{results.load_after:.1f} after; the link is emulated (tbf)"
    )
    for case in results.cases:
        for note in case.notes:
            print(f"{case.link}, {case.prompt_tokens} tokens: {note}")


def plot_transfer(results: TransferResults, path: Path) -> None:
    """Writes TTFT over prompt length, a panel for each link and path. Raises ValueError without matplotlib, OSError."""
    require_matplotlib()
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], list[TransferCase]] = {}
    for case in results.cases:
        groups.setdefault((case.link, case.path), []).append(case)
    figure = Figure(figsize=(4 * len(groups), 3.6), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, ((link, through), cases) in zip(panels, groups.items(), strict=True):
        lengths = [case.prompt_tokens for case in cases]
        for label, values in (
            ("packed", [case.ttft_packed_s for case in cases]),
            ("bf16", [case.ttft_bf16_s for case in cases]),
            ("recompute", [case.ttft_recompute_s for case in cases]),
        ):
            known = [(x, y) for x, y in zip(lengths, values, strict=True) if y is not None]
            axes.plot([x for x, _ in known], [y for _, y in known], marker="o", label=label)
        axes.set_title(f"{link}, {through}")
        axes.set_xlabel("prompt tokens")
        axes.set_yscale("log")
    panels[0].set_ylabel("TTFT, s")
    panels[0].legend()
    figure.savefig(path)


def _by_link(cases: list[TransferCase]) -> list[TransferCase]:
    """One case of each link and length: hand-overs do not take the path."""
    return list({(case.link, case.prompt_tokens): case for case in cases}.values())


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.2f}"


def _ratio(more: float | None, less: float | None) -> str:
    return "-" if more is None or not less else f"{more / less:.2f}x"
