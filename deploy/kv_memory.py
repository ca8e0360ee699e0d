"""How much memory the block pool gets, and what fits into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch

from kvferry.decode.cache import split_layers
from kvferry.kernels.layout import BlockLayout


def free_bytes(device: torch.device) -> int:
    """Memory that is free now: the GPU's, or what the system can give without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    available: int = psutil.virtual_memory().available
    return available


class KVPlan(NamedTuple):
    """How a decode worker's KV memory is used."""

    num_bytes: int
    num_blocks: int
    """Of the pool."""
    ring_bytes: int
    """For the layers with a window, of all sequences."""
    layout: BlockLayout

    def __str__(self) -> str:
        """The sentence for the log at start."""
        pool = self.num_bytes - self.ring_bytes
        packed = self.num_blocks * self.layout.block_size
        plain = self.num_bytes // self.layout.bytes_per_token_bf16
        bits = 16 * self.layout.block_bytes / (self.layout.bytes_per_token_bf16 * self.layout.block_size)
        rings = f" and {self.ring_bytes / 2**20:,.0f} MiB for layers with a window" if self.ring_bytes else ""
        return (
            f"the block pool of {pool / 2**20:,.0f} MiB{rings} holds {packed:,} tokens at {bits:.2f} bits a value; "
            f"at 16 bits it would hold {plain:,}"
        )


def plan_kv_memory(
    kv_memory: int | float,
    layout: BlockLayout,
    device: torch.device,
    *,
    windows: Sequence[int | None],
    num_slots: int,
    max_model_len: int,
) -> KVPlan:
    """Call it when the model is loaded. Raises ValueError when not one block fits."""
    num_bytes = kv_memory if isinstance(kv_memory, int) else int(kv_memory * free_bytes(device))
    rings, pool, ring_blocks = split_layers(layout, windows)
    ring_bytes = num_slots * ring_blocks * rings.block_bytes
    if not pool.block_bytes:  # every layer has a window: blocks in the pool take no memory
        num_blocks = num_slots * (max_model_len // layout.block_size)
    else:
        num_blocks = (num_bytes - ring_bytes) // pool.block_bytes
    if num_blocks < 1 or ring_bytes > num_bytes:
        needed = f" and {ring_bytes} bytes for its {num_slots} sequences' windows" if ring_bytes else ""
        raise ValueError(
            f"{num_bytes} bytes of KV memory hold no block of {pool.block_bytes} bytes{needed}: "
            "give the decode worker more memory (--kv-memory)" + (" or fewer max_num_seqs" if ring_bytes else "")
        )
    return KVPlan(num_bytes, num_blocks, ring_bytes, layout)
