"""Whether a matmul gives a row the same bits whatever the number of rows: tried on the machine."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kvferry.deploy.int8_linear import Int8Linear
from kvferry.deploy.prepacked_linear import PrepackedLinear
from kvferry.kernels.forward import padded_rows

Linear = torch.nn.Linear | Int8Linear | PrepackedLinear


def linears_keep_rows(linears: Iterable[Linear], *, max_rows: int) -> bool:
    """Whether a row of each of these has the same bits at every row count that decode pads to, up to `max_rows`. It is
    a property of the library and the chip."""
    counts = _row_counts(max_rows)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for linear in linears:
            rows = torch.randn(counts[-1], linear.in_features, generator=generator)
            rows = rows.to(linear.weight) if isinstance(linear, torch.nn.Linear) else rows.to(linear.dtype)
            widest = linear(rows)
            if not all(torch.equal(linear(rows[:n].contiguous()), widest[:n]) for n in counts):
                return False
    return True


def activations_keep_rows(
    functions: Iterable[torch.nn.Module], *, columns: Iterable[int], max_rows: int, like: torch.Tensor
) -> bool:
    """The same for elementwise functions: they give an element other bits at the end of a thread's share than inside
    it, with some numbers of threads. Rows are of `like`'s dtype and device."""
    counts = _row_counts(max_rows)
    generator = torch.Generator().manual_seed(0)
    sizes = sorted(set(columns))
    with torch.inference_mode():
        for function in functions:
            for size in sizes:
                rows = (4 * torch.randn(counts[-1], size, generator=generator)).to(like)
                whole = function(rows)
                if not all(torch.equal(function(rows[:n].contiguous()), whole[:n]) for n in counts):
                    return False
    return True


def _row_counts(max_rows: int) -> list[int]:
    """Row counts of decode batches of up to `max_rows`; above 48 only the largest."""
    return sorted({padded_rows(n) for n in range(1, min(max_rows, 48) + 1)} | {padded_rows(max_rows)})


def distinct_linears(model: torch.nn.Module) -> list[Linear]:
    """One linear layer of each shape."""
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    return list({(type(m), m.in_features, m.out_features, m.bias is None): m for m in linears}.values())
