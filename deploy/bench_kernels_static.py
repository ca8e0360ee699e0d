"""`kvferry bench kernels --static`: what the Triton kernels compile to, and what that allows on paper. No GPU runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from kvferry.kernels.machine_code import compile_kernels
from kvferry.kernels.roofline import ASSUMED_BANDWIDTH_SHARE, ASSUMED_DEVICES, UNITS


@dataclass(frozen=True, kw_only=True)
class StaticKernel:
    """Figures of one kernel on one target, all read from its machine code."""

    name: str
    target: str
    registers: int
    """A thread."""
    spills: int
    """Loads and stores of local memory."""
    instructions_per_token_head: float | None
    """Of the main loop, or of a kernel without one, for each token of one KV head; None for the merge and on AMD."""
    static_bound: float | None
    """An estimate, `roofline.static_bound`; None where arithmetic should be the bound, and on AMD."""


def static_kernels(targets: Sequence[str]) -> list[StaticKernel]:
    """Compiles every kernel for targets of `machine_code.TARGETS`: about 20 s each, unless Triton has them cached.

    Raises ValueError for an unknown target and RuntimeError when a kernel does not compile or Triton is missing.
    """
    return [
        StaticKernel(
            name=code.name,
            target=code.target,
            registers=code.registers,
            spills=code.spills,
            instructions_per_token_head=code.instructions_per_token_head,
            static_bound=code.static_bound,
        )
        for code in compile_kernels(targets)
    ]


def print_static_kernels(kernels: Sequence[StaticKernel], *, console: Console | None = None) -> None:
    """Prints a table, labelled as an estimate, and what the estimate assumes."""
    table = Table(title="Triton kernels, compiled and counted: an ESTIMATE, nothing ran on a GPU")
    for column in ("kernel", "target", "registers", "spills", "instructions / token-head", "static bound"):
        table.add_column(column, justify="left" if column in ("kernel", "target") else "right")
    for kernel in kernels:
        table.add_row(
            kernel.name,
            kernel.target,
            str(kernel.registers),
            str(kernel.spills),
            _figure(kernel.instructions_per_token_head, 1),
            _figure(kernel.static_bound, 2),
        )
    console = console or Console(width=100)
    console.print(table)
    console.print(
        "Static bound: clocks that memory takes over clocks of the slowest unit, at most 1 (bound by memory on paper). "
        f"Assumed, not measured: {ASSUMED_BANDWIDTH_SHARE:.0%} of the data sheet's bandwidth; no latency, bank "
        "conflict or low occupancy; for each multiprocessor and clock, in instructions of a warp:",
        highlight=False,
    )
    for target in dict.fromkeys(kernel.target for kernel in kernels):
        if device := ASSUMED_DEVICES.get(target):
            rates = ", ".join(f"{unit} {getattr(device, unit):g}" for unit in ("issue", *UNITS))
            console.print(
                f"  {target}: {device.name}, {device.multiprocessors} multiprocessors, {device.clock_ghz} GHz, "
                f"{device.bandwidth_tb_s} TB/s; {rates}",
                highlight=False,
            )
        else:
            console.print(f"  {target}: registers and spills only", highlight=False)


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
