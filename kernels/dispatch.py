"""Chooses the implementation of the packed kernels for a device, and says why."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvferry.kernels.cpu import native
from kvferry.kernels.packed import PackedKernels
from kvferry.kernels.reference import ReferenceKernels


class Selection(NamedTuple):
    kernels: PackedKernels
    reason: str
    """One sentence for the log: a silent fallback would be a slowdown of an order of magnitude."""


def select_kernels(device: torch.device, *, head_dim: int, impl: str | None = None) -> Selection:
    """The kernels for `device`; `impl` ("reference", "cpu", "cpu-int8", "triton") overrides the choice.

    "cpu-int8" is "cpu" with one byte a number in decode attention: faster, but off by per cents, more at large scores.

    Raises ValueError when the implementation asked for cannot run here.
    """
    if impl == "reference":
        return Selection(ReferenceKernels(), "reference kernels, as asked for (slow)")
    if impl == "triton" or (impl is None and device.type == "cuda"):
        try:
            from kvferry.kernels.triton_kernels import TritonKernels
        except ImportError as error:
            raise ValueError(f"Triton is missing: pip install 'kvferry[gpu]' ({error})") from error
        return Selection(TritonKernels(), f"Triton kernels on {device}")
    try:
        kernels = native.load(head_dim, terms=1 if impl == "cpu-int8" else 2)
    except native.NativeUnavailable as error:
        if impl in ("cpu", "cpu-int8"):
            raise ValueError(f"the CPU kernels cannot run here: {error}") from error
        return Selection(ReferenceKernels(), f"reference kernels (slow), because {error}")
    return Selection(kernels, f"CPU kernels {kernels.name}")
