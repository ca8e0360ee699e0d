"""One calibration from its options to its spec file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvferry.deploy.calibration.budget import Choice, Place, spend
from kvferry.deploy.calibration.measure import OneTensorStep, Yardstick
from kvferry.deploy.calibration.progress_file import ProgressFile
from kvferry.deploy.evaluation.text import read_text, windows
from kvferry.deploy.models import find_model, load_model, load_tokenizer
from kvferry.deploy.spec_file import spec_to_json
from kvferry.kernels.dispatch import select_kernels
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.presets import PRESETS
from kvferry.kernels.rotation import RotatedModel
from kvferry.kernels.spec import KVQuantSpec, TensorSpec

BASE = PRESETS["kv2"]
LADDERS: dict[str, tuple[TensorSpec, ...]] = {
    "key": (BASE.layer.key, PRESETS["kv4"].layer.key, TensorSpec(bits=8), TensorSpec(bits=16)),
    "value": (BASE.layer.value, PRESETS["kv4"].layer.value, TensorSpec(bits=8), TensorSpec(bits=16)),
}
"""Cheapest first."""
BITS_CONTEXT = 4096
SKIPPED_BLOCKS = 1
"""Predictions in a window's first block see nothing quantized."""


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """What to calibrate on."""

    model: str
    bits: float
    text: Path | None
    windows: int
    window_blocks: int
    kernels: str | None = None


def run_calibration(plan: CalibrationPlan, out: Path, *, plot: Path | None = None) -> KVQuantSpec:
    """Measures, chooses, writes `out` and says what it chose. Takes up what an earlier run left beside `out`.

    `plot`: also draw the error by layer into this file.

    Raises ValueError, OSError, or what the model raised.
    """
    source = find_model(plan.model)
    token_ids = [int(i) for i in load_tokenizer(source).encode(read_text(plan.text))]
    cut = windows(token_ids, length=plan.window_blocks * BASE.block_size, count=plan.windows)
    loaded = load_model(source, device=torch.device("cpu"), dtype=torch.float32)
    if cut.shape[1] > loaded.model.max_model_len:
        raise ValueError(f"windows of {cut.shape[1]} tokens do not fit the model's {loaded.model.max_model_len}")
    model = RotatedModel(loaded.model, loaded.device)
    kernels = select_kernels(loaded.device, head_dim=model.head_dim, impl=plan.kernels).kernels
    layout = BlockLayout(
        num_layers=model.num_layers, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, spec=BASE
    )
    spend(layout, _ladders(layout, {}), bits=plan.bits, bits_context=BITS_CONTEXT)  # refuses a budget before the work
    digest = hashlib.sha256(loaded.weights_digest + cut.numpy().tobytes() + BASE.digest() + kernels.name.encode())
    progress_file = ProgressFile(out.with_name(out.name + ".progress"), digest.hexdigest())
    yardstick = Yardstick(model, cut, skip=SKIPPED_BLOCKS * BASE.block_size)
    measured: dict[tuple[Place, TensorSpec], float] = {}
    places = [Place(layer, side) for layer in range(model.num_layers) for side in LADDERS]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("measuring", total=sum(len(LADDERS[place.side]) - 1 for place in places))
        for place in places:
            for tensor in LADDERS[place.side][:-1]:  # 16 bits cost nothing
                kl = progress_file.get(place, tensor)
                if kl is None:
                    step = OneTensorStep(BASE, kernels, layer=place.layer, side=place.side, tensor=tensor)
                    kl = yardstick.kl(step)
                    progress_file.put(place, tensor, kl)
                measured[place, tensor] = kl
                progress.advance(task)
    spec = spend(layout, _ladders(layout, measured), bits=plan.bits, bits_context=BITS_CONTEXT)
    out.write_text(spec_to_json(spec))
    progress_file.remove()
    _print(replace(layout, spec=spec), measured)
    if plot is not None:
        _plot(plot, layout, measured)
    print(f"wrote {out}; serve it with: kvferry serve {plan.model} --preset {out}")
    return spec


def _ladders(layout: BlockLayout, measured: dict[tuple[Place, TensorSpec], float]) -> dict[Place, list[Choice]]:
    return {
        Place(layer, side): [Choice(tensor, measured.get((Place(layer, side), tensor), 0.0)) for tensor in ladder]
        for layer in range(layout.num_layers)
        for side, ladder in LADDERS.items()
    }


def _print(layout: BlockLayout, measured: dict[tuple[Place, TensorSpec], float]) -> None:
    table = Table(title=f"bits by layer; KL with {BASE.layer.key.bits} bits there and 16 elsewhere, nats a token")
    for column in ("layer", "K bits", "V bits", "KL of K", "KL of V"):
        table.add_column(column, justify="right")
    for index in range(layout.num_layers):
        layer = layout.spec.of_layer(index)
        table.add_row(
            str(index),
            str(layer.key.bits),
            str(layer.value.bits),
            *(f"{measured[Place(index, side), LADDERS[side][0]]:.5f}" for side in ("key", "value")),
        )
    console = Console(width=100)
    console.print(table)
    console.print(f"{layout.effective_bits(BITS_CONTEXT):.3f} effective bits at {BITS_CONTEXT} tokens")


def _plot(path: Path, layout: BlockLayout, measured: dict[tuple[Place, TensorSpec], float]) -> None:
    """Error by layer, for every width that was measured. Needs matplotlib. Raises OSError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, row = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained", sharey=True)
    layers = list(range(layout.num_layers))
    for axes, (side, ladder) in zip(row, LADDERS.items(), strict=True):
        for tensor in ladder[:-1]:
            errors = [measured[Place(layer, side), tensor] for layer in layers]
            axes.plot(layers, errors, marker="o", markersize=3, label=f"{tensor.bits} bits")
        axes.set_title(f"{side}s of one layer quantized, the rest at 16 bits")
        axes.set_xlabel("layer")
        axes.set_yscale("log")
        axes.legend()
    row[0].set_ylabel("KL, nats a token")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
