"""A page format as a compile-time constant of the Triton kernels: plain numbers, resolved outside of the kernels.

Triton's cache knows a kernel by its source and the text of its constants. What a kernel needs from `page.py` and
`scales.py` must therefore be in that text: a method called at compile time would leave stale machine code behind when
it changes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from kvferry.kernels.page import PageFormat
from kvferry.kernels.reference import FIT_SHRINK
from kvferry.kernels.scales import unit_offset, zero_step
from kvferry.kernels.spec import PAGE, TensorSpec

UNIT = 16
"""Every part of a page begins at a multiple of this many bytes."""


@dataclass(frozen=True, kw_only=True)
class TensorShape:
    """K or V of a page. With 16 bits there is nothing but `codes`: fp16 [tokens][D]."""

    bits: int
    planes: int
    """2-bit planes of a code."""
    group: int
    """Values that share a scale."""
    groups: int
    """K: groups of a channel. V: groups of a token."""
    byte_scales: bool
    offset: int
    """u for the code 0: `scales.unit_offset`."""
    zero_step: float
    """`scales.zero_step`"""
    first_scale: float
    """The fit's first scale over max - min."""
    codes: int
    """Where the codes begin in a page, in bytes; scales and zero points likewise."""
    scale: int
    zero: int


@dataclass(frozen=True, kw_only=True)
class BoostShape:
    """The boosted channels of K, whose codes have one plane more: they are stored for u with F of those codes."""

    channels: int
    """How many; 0: none, and nothing else here counts."""
    listed: int
    """Where their list begins in a page, in bytes."""
    room: int
    """Bytes of the list, with what fills it up."""
    codes: int
    """Where their highest plane begins."""
    weight: int
    """What that plane's u = 1 + code/4 counts in u of the whole code: 4^planes."""
    extra_step: float
    """Of a zero point's step over S: what goes beyond the other channels' `zero_step`, over `weight`."""
    top: int
    """Highest code; then, as in `TensorShape`, for their codes."""
    offset: int
    zero_step: float
    first_scale: float


@dataclass(frozen=True, kw_only=True)
class PageShape:
    """A page of `tiles` tiles of 32 tokens."""

    head_dim: int
    tiles: int
    units: int
    """Size of a page in units of 16 bytes."""
    keys: TensorShape
    values: TensorShape
    boost: BoostShape


@functools.cache
def page_shape(page: PageFormat) -> PageShape:
    o = page.offsets
    return PageShape(
        head_dim=page.head_dim,
        tiles=page.tokens // PAGE,
        units=page.num_bytes // UNIT,
        keys=_tensor_shape(page.spec.key, page.k_groups, o.k_codes, o.k_scale, o.k_zero),
        values=_tensor_shape(page.spec.value, page.v_groups, o.v_codes, o.v_scale, o.v_zero),
        boost=_boost_shape(page),
    )


def _tensor_shape(tensor: TensorSpec, groups: int, codes: int, scale: int, zero: int) -> TensorShape:
    packed = tensor.bits < 16
    return TensorShape(
        bits=tensor.bits,
        planes=tensor.bits // 2 if packed else 0,
        group=tensor.group_size,
        groups=groups if packed else 0,
        byte_scales=packed and tensor.scales == "8bit",
        offset=unit_offset(tensor.bits) if packed else 0,
        zero_step=zero_step(tensor.bits),
        first_scale=_first_scale(tensor.bits) if packed else 0.0,
        codes=codes,
        scale=scale,
        zero=zero,
    )


def _boost_shape(page: PageFormat) -> BoostShape:
    if not page.boosted:
        return BoostShape(
            channels=0, listed=0, room=0, codes=0, weight=0, extra_step=0.0, top=0, offset=0, zero_step=0.0,
            first_scale=0.0,
        )  # fmt: skip
    o = page.offsets
    bits = page.spec.key.bits
    weight = 1 << bits
    return BoostShape(
        channels=page.boosted,
        listed=o.k_channels,
        room=o.v_codes - o.k_channels,
        codes=o.k_boost,
        weight=weight,
        extra_step=(zero_step(bits + 2) - zero_step(bits)) / weight,
        top=2 ** (bits + 2) - 1,
        offset=unit_offset(bits + 2),
        zero_step=zero_step(bits + 2),
        first_scale=_first_scale(bits + 2),
    )


def _first_scale(bits: int) -> float:
    return FIT_SHRINK[bits] / ((1 << bits) - 1)
