"""Results as a table, as JSON and as plots."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvferry.deploy.evaluation.needle import NeedleResult
from kvferry.deploy.evaluation.run import BITS_CONTEXT, EvalResult


def print_results(results: list[EvalResult], agreements: dict[str, float]) -> None:
    """`agreements`: by preset, the mean share of an answer before it differs from that on 16 bits."""
    table = Table(title=f"against the unquantized cache; effective bits at {BITS_CONTEXT} tokens, everything counted")
    columns = ["preset", "context", "bits", "KL", "perplexity", "over fp", "top-1"]
    if agreements:
        columns.append("same text")
    for column in columns:
        table.add_column(column, justify="left" if column == "preset" else "right")
    for r in results:
        row = [
            r.preset,
            str(r.context),
            f"{r.effective_bits:.2f}",
            f"{r.kl:.4f}",
            f"{r.perplexity:.3f}",
            f"{(r.perplexity / r.perplexity_fp - 1) * 100:+.2f} %",
            f"{r.top1:.3f}",
        ]
        if agreements:
            row.append(f"{agreements[r.preset]:.2f}" if r.preset in agreements else "")
        table.add_row(*row)
    console = Console(width=100)
    console.print(table)
    if results:
        console.print(f"perplexity of the unquantized cache: {_fp_line(results)}")


def _fp_line(results: list[EvalResult]) -> str:
    by_context = {r.context: r.perplexity_fp for r in results}
    return ", ".join(f"{value:.3f} at {context}" for context, value in by_context.items())


def print_needles(needles: list[NeedleResult]) -> None:
    table = Table(title="pass keys found, by length of the prompt")
    lengths = sorted({n.length for n in needles})
    table.add_column("preset")
    for length in lengths:
        table.add_column(str(length), justify="right")
    for preset in dict.fromkeys(n.preset for n in needles):
        row = []
        for length in lengths:
            found = [n.found for n in needles if n.preset == preset and n.length == length]
            row.append(f"{sum(found)} of {len(found)}")
        table.add_row(preset, *row)
    Console(width=100).print(table)


def write_json(
    path: Path,
    *,
    model: str,
    text: str,
    results: list[EvalResult],
    agreements: dict[str, float],
    needles: list[NeedleResult],
) -> None:
    content: dict[str, Any] = {
        "model": model,
        "text": text,
        "results": [asdict(r) for r in results],
        "agreement": agreements,
        "needles": [asdict(n) for n in needles],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def plot(folder: Path, *, results: list[EvalResult], needles: list[NeedleResult]) -> list[Path]:
    """PNG plots into an existing folder. Needs matplotlib. Raises OSError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    if results:
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for context in sorted({r.context for r in results}):
            shown = [r for r in results if r.context == context and r.effective_bits < 16]
            axes.scatter([r.effective_bits for r in shown], [r.kl for r in shown], label=f"{context} tokens")
            for r in shown:
                axes.annotate(r.preset, (r.effective_bits, r.kl), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.set_yscale("log")
        axes.set_xlabel(f"effective bits at {BITS_CONTEXT} tokens")
        axes.set_ylabel("KL to the unquantized cache, nats a token")
        axes.legend(title="context")
        written.append(folder / "eval-error.png")
        figure.savefig(written[-1], dpi=120)
    if needles:
        presets = list(dict.fromkeys(n.preset for n in needles))
        figure, row = pyplot.subplots(
            1, len(presets), figsize=(3 * len(presets), 3), layout="constrained", squeeze=False, sharey=True
        )
        lengths, depths = sorted({n.length for n in needles}), sorted({n.depth for n in needles})
        for axes, preset in zip(row[0], presets, strict=True):
            found = {(n.depth, n.length): n.found for n in needles if n.preset == preset}
            axes.imshow(
                [[float(found[depth, length]) for length in lengths] for depth in depths],
                vmin=0,
                vmax=1,
                cmap="RdYlGn",
                aspect="auto",
            )
            axes.set_title(preset)
            axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
            axes.set_xlabel("tokens")
        row[0][0].set_ylabel("depth of the pass key")
        written.append(folder / "eval-needle.png")
        figure.savefig(written[-1], dpi=120)
    pyplot.close("all")
    return written
