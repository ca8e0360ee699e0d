"""One prompt's blocks as they are stored and moved: whole, in memory that every rank of a group maps.

Ranks write their KV heads' bytes where they belong in the whole payload, and read them there. Nothing is repacked.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.shards import ByteRange


class SharedPrompt:
    """Payloads of the complete blocks, and the fp16 tail [layer, K|V, kv_head, token, D], of all KV heads."""

    def __init__(self, layout: BlockLayout, num_tokens: int, fd: int) -> None:
        """Maps the file `fd`, which it then owns; use `create` to make one."""
        self.fd = fd
        weakref.finalize(self, os.close, fd).atexit = False
        self._layout = layout
        num_blocks, tail_len = divmod(num_tokens, layout.block_size)
        layers, two, heads, _, dim = layout.tail_shape
        tail_bytes = tail_len * layout.bytes_per_token_bf16
        sizes = [layout.payload_bytes(min(index, 1)) for index in range(num_blocks)]
        size = max(tail_bytes + sum(sizes), 1)
        if os.fstat(fd).st_size == 0:
            os.ftruncate(fd, size)
        # The tensors hold the mapping; it goes with the last of them.
        memory = torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)
        self.tail = memory[:tail_bytes].view(torch.float16).view(layers, two, heads, tail_len, dim)
        self._payloads = torch.split(memory[tail_bytes : tail_bytes + sum(sizes)], sizes) if sizes else ()

    @classmethod
    def create(cls, layout: BlockLayout, num_tokens: int) -> SharedPrompt:
        """In anonymous memory that goes with its last user, however that ends."""
        return cls(layout, num_tokens, os.memfd_create("kvferry-prompt", os.MFD_CLOEXEC))

    def payload(self, index: int) -> Tensor:
        """uint8 [payload_bytes], a view."""
        return self._payloads[index]


def take(payload: Tensor, ranges: Sequence[ByteRange]) -> Tensor:
    """These bytes of a payload, one after the other: a shard's payload."""
    parts = [payload[offset : offset + length] for offset, length in ranges]
    return parts[0].clone() if len(parts) == 1 else torch.cat(parts)
