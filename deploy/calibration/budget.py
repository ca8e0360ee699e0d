"""Spending a budget of bits where it helps most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.spec import KVQuantSpec, LayerSpec, TensorSpec


class Place(NamedTuple):
    """K or V of one layer."""

    layer: int
    side: str
    """ "key" or "value"."""


@dataclass(frozen=True)
class Choice:
    """One way to store a tensor, and what it costs in answers: KL in nats a token, the rest of the model at 16 bits."""

    tensor: TensorSpec
    kl: float


def spend(
    layout: BlockLayout,
    ladders: Mapping[Place, Sequence[Choice]],
    *,
    bits: float,
    bits_context: int,
) -> KVQuantSpec:
    """The spec with the least sum of KL that a greedy search finds within `bits` effective bits at `bits_context`.

    Each ladder lists a tensor's choices, cheapest first. Everything starts on the first; then, again and again, the
    step that saves most KL a bit is taken, if it still fits. Errors are taken to add up (KVTuner, arXiv 2502.04420,
    does the same by layer). `layout` gives the model and what its spec says besides bits. Raises ValueError when the
    first choices do not fit.
    """
    level = dict.fromkeys(ladders, 0)
    spec = _spec(layout, ladders, level)
    least = _bits(layout, spec, bits_context)
    if least > bits:
        raise ValueError(f"the budget of {bits} bits is below the least, {least:.3f} bits")
    while True:
        best: tuple[float, Place, int, KVQuantSpec] | None = None
        used = _bits(layout, spec, bits_context)
        for place, ladder in sorted(ladders.items()):
            for step in range(level[place] + 1, len(ladder)):
                saved = ladder[level[place]].kl - ladder[step].kl
                taller = _spec(layout, ladders, level | {place: step})
                total = _bits(layout, taller, bits_context)
                if saved <= 0 or total > bits:
                    continue
                gain = saved / (total - used)
                if best is None or gain > best[0]:
                    best = gain, place, step, taller
        if best is None:
            return spec
        _, place, step, spec = best
        level[place] = step


def _bits(layout: BlockLayout, spec: KVQuantSpec, context: int) -> float:
    return BlockLayout(
        num_layers=layout.num_layers, num_kv_heads=layout.num_kv_heads, head_dim=layout.head_dim, spec=spec
    ).effective_bits(context)


def _spec(layout: BlockLayout, ladders: Mapping[Place, Sequence[Choice]], level: Mapping[Place, int]) -> KVQuantSpec:
    """The choices of every layer; the commonest layer becomes the one that `overrides` need not name."""
    layers = [
        LayerSpec(**{side: ladders[Place(index, side)][level[Place(index, side)]].tensor for side in ("key", "value")})
        for index in range(layout.num_layers)
    ]
    common = max(dict.fromkeys(layers), key=layers.count)
    overrides = tuple((index, layer) for index, layer in enumerate(layers) if layer != common)
    base = layout.spec
    return KVQuantSpec(
        layer=common,
        overrides=overrides,
        fit=base.fit,
        value_rotation=base.value_rotation,
        sink_tokens=base.sink_tokens,
        block_size=base.block_size,
    )
