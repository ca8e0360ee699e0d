"""How much memory the block pool gets, and what fits into it."""

from __future__ import annotations

import psutil
import torch

from kvferry.kernels.layout import BlockLayout


def free_bytes(device: torch.device) -> int:
    """Memory that is free now: the GPU's, or what the system can give without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    available: int = psutil.virtual_memory().available
    return available


def pool_blocks(kv_memory: int | float, layout: BlockLayout, device: torch.device) -> int:
    """Blocks of the pool. Call it when the model is loaded. Raises ValueError when not one block fits."""
    num_bytes = kv_memory if isinstance(kv_memory, int) else int(kv_memory * free_bytes(device))
    num_blocks = num_bytes // layout.block_bytes
    if num_blocks < 1:
        raise ValueError(
            f"the block pool of {num_bytes} bytes holds no block of {layout.block_bytes} bytes: "
            "give the decode worker more memory (--kv-memory)"
        )
    return num_blocks


def what_fits(num_blocks: int, layout: BlockLayout) -> str:
    """The sentence for the log at start."""
    num_bytes = num_blocks * layout.block_bytes
    packed, plain = num_blocks * layout.block_size, num_bytes // layout.bytes_per_token_bf16
    bits = 8 * layout.block_bytes / (layout.bytes_per_token_bf16 * layout.block_size / 2)
    return (
        f"the block pool of {num_bytes / 2**20:,.0f} MiB holds {packed:,} tokens at {bits:.2f} bits a value; "
        f"at 16 bits it would hold {plain:,}"
    )
