"""What a launch depends on besides its arguments: the device, and tables of warps, stages and registers for it.

The tables hold what the compiler's own choice does badly; what is not in them takes the default. Numbers are from the
machine code (`triton_aot.py`), none was tuned on a device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton import knobs

from kvferry.kernels.triton_page import PageShape


class Device(NamedTuple):
    """sm_80 is ("cuda", 80); HIP devices are not told apart; neither is a kernel interpreted on the CPU: ("", 0)."""

    backend: str
    capability: int

    @property
    def asm(self) -> bool:
        """Whether kernels may hold inline PTX."""
        return self.backend == "cuda"

    @property
    def narrow(self) -> int:
        """The least number of query columns that a dot takes."""
        return 16 if self.backend == "hip" else 8


def current_device() -> Device:
    if knobs.runtime.interpret:
        return Device("", 0)
    if torch.version.hip is not None:
        return Device("hip", 0)
    if not torch.cuda.is_available():
        return Device("cuda", 0)
    major, minor = torch.cuda.get_device_capability()
    return Device("cuda", 10 * major + minor)


PACKED: dict[str, Any] = {"num_warps": 1, "num_stages": 3, "enable_fp_fusion": True}
"""One warp a program: more repeat the unpacking. Three stages: the block table is fetched ahead of the pages."""
PACKED_EXCEPT: dict[tuple[Device, int, int], dict[str, Any]] = {
    # ptxas takes 254 registers, which is 8 warps a multiprocessor, where 168 (12 warps) do without a spill.
    (Device("cuda", 80), 64, 8): {"maxnreg": 168},
    (Device("cuda", 80), 128, 8): {"maxnreg": 168},
}
"""By device, head_dim and query heads a KV head, as padded for a dot."""
PACKED_BOOSTED: dict[tuple[str, int, int, int], dict[str, Any]] = {
    # As above: 239 registers, where 168 cost 3 per cent more instructions.
    ("cuda", 128, 8, 1): {"maxnreg": 168},
    # With three stages, what is fetched ahead does not fit the registers; nor, for once, does ptxas do well with all.
    ("cuda", 128, 8, 2): {"num_stages": 2, "maxnreg": 240},
    ("cuda", 128, 16, 2): {"num_stages": 2},
}
"""With boosted channels, by backend, head_dim, padded query heads and planes of K."""
TAIL: dict[str, Any] = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
MERGE: dict[str, Any] = {"num_warps": 2, "num_stages": 2, "enable_fp_fusion": True}
CHUNK: dict[str, Any] = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
CHUNK_EXCEPT: dict[tuple[str, int], dict[str, Any]] = {
    # Queries and sums of 64 rows do not fit the registers of four warps; a wave of HIP has twice as many threads.
    ("cuda", 256): {"num_warps": 8},
}
"""By backend and lanes of a head: head_dim, padded to a power of two."""


def packed_options(device: Device, shape: PageShape, padded: int) -> dict[str, Any]:
    options = PACKED | PACKED_EXCEPT.get((device, shape.head_dim, padded), {})
    if shape.boost.channels:
        options |= PACKED_BOOSTED.get((device.backend, shape.head_dim, padded, shape.keys.planes), {})
    return options


def chunk_options(device: Device, lanes: int) -> dict[str, Any]:
    return CHUNK | CHUNK_EXCEPT.get((device.backend, lanes), {})
