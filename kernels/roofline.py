"""An estimate of whether a loop can keep up with memory, from its instructions alone.

Instructions of the main loop are counted by the unit that executes them. Each unit's clocks are set against the clocks
that a multiprocessor's share of the memory bandwidth takes to deliver what the loop reads:

    static bound = memory clocks / clocks of the slowest unit, at most 1

1 means bound by memory on paper. Latency, occupancy, bank conflicts and dependencies do not enter. Every rate below is
assumed: from data sheets and NVIDIA's table of arithmetic throughput, measured on nothing here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

ASSUMED_BANDWIDTH_SHARE = 0.92
"""Assumed share of the data sheet's bandwidth that a kernel can get."""


@dataclass(frozen=True, kw_only=True)
class AssumedDevice:
    """What is assumed of a GPU. Rates are instructions of a warp in one clock of one multiprocessor."""

    name: str
    multiprocessors: int
    clock_ghz: float
    bandwidth_tb_s: float
    issue: float = 4.0
    integer: float = 2.0
    """Logic, shifts, permutes, comparisons, additions."""
    fma: float = 4.0
    """fp32, and the integer multiply-adds that ptxas also takes for shifts and moves."""
    half: float = 4.0
    """Pairs of fp16."""
    memory: float = 1.0
    """Loads, stores, asynchronous copies and shuffles, conflicts not counted."""
    special: float = 0.5
    tensor: float = 0.5
    """HMMA.16816 with fp32 accumulation."""

    @property
    def bytes_per_clock(self) -> float:
        """A multiprocessor's share of what memory delivers."""
        return self.bandwidth_tb_s * 1e3 * ASSUMED_BANDWIDTH_SHARE / self.multiprocessors / self.clock_ghz


ASSUMED_DEVICES = {
    "sm_80": AssumedDevice(name="A100 80 GB", multiprocessors=108, clock_ghz=1.41, bandwidth_tb_s=2.039, fma=2.0),
    "sm_89": AssumedDevice(
        name="L40S", multiprocessors=142, clock_ghz=2.52, bandwidth_tb_s=0.864, half=2.0, tensor=0.25
    ),
    "sm_90": AssumedDevice(name="H100 SXM", multiprocessors=132, clock_ghz=1.755, bandwidth_tb_s=3.35),
    "sm_100": AssumedDevice(name="B200", multiprocessors=148, clock_ghz=1.85, bandwidth_tb_s=8.0),
    "sm_120": AssumedDevice(
        name="RTX 5090", multiprocessors=170, clock_ghz=2.41, bandwidth_tb_s=1.792, half=2.0, tensor=0.125
    ),
}
"""By compilation target. sm_90's are the rates of the kernels' design notes; tcgen05 is not modelled."""

UNITS = {
    "tensor": re.compile(r"[HIQ]G?MMA"),
    "memory": re.compile(r"LDG|STG|LDGSTS|RED|ATOMS?|LDS|STS|LDSM|STSM|MOVM|SHFL|LDL|STL|UBLKCP|UTMALDG"),
    "special": re.compile(r"MUFU|F2F|F2I|I2F"),
    "half": re.compile(r"HFMA2|HADD2|HMUL2|HMNMX2|HSETP?2?"),
    "fma": re.compile(r"FFMA2?|FMUL2?|FADD2?|IMAD"),
    "integer": re.compile(
        r"LOP3?|SHF|IADD3?|VIADD|LEA|[IFP]SETP|PRMT|[F]?SEL|V?IMNMX3?|VIADDMNMX|FMNMX3?|PLOP3|I2I|BFE|POPC|IABS|SGXT"
        r"|F2FP|I2FP|MOV|CS2R"
    ),
}
"""The unit that executes an opcode; what matches none (branches, barriers, the uniform path) only takes issue slots."""


def count_units(opcodes: Iterable[str]) -> Counter[str]:
    """How many instructions each unit executes, and under "issue" all of them."""
    counts: Counter[str] = Counter()
    for opcode in opcodes:
        counts["issue"] += 1
        base = opcode.split(".")[0]
        for unit, pattern in UNITS.items():
            if pattern.fullmatch(base):
                counts[unit] += 1
                break
    return counts


def unit_clocks(opcodes: Iterable[str], device: AssumedDevice, *, warps: int) -> dict[str, float]:
    """Clocks of each unit of a multiprocessor for one pass of a program of `warps` warps."""
    counts = count_units(opcodes)
    return {unit: counts[unit] * warps / float(getattr(device, unit)) for unit in ("issue", *UNITS)}


def static_bound(opcodes: Iterable[str], device: AssumedDevice, *, warps: int, num_bytes: float) -> float:
    """Memory clocks over the slowest unit's, at most 1; `num_bytes` is what one pass moves."""
    slowest = max(unit_clocks(opcodes, device, warps=warps).values())
    return min(1.0, num_bytes / device.bytes_per_clock / slowest)
