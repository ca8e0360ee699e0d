"""The packed kernels on a GPU, in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from kvferry.kernels import page
from kvferry.kernels.packed import DecodeBatch, PackedPrefix
from kvferry.kernels.page import PageFormat
from kvferry.kernels.triton_chunk import chunk_attention
from kvferry.kernels.triton_decode import decode_attention, merge_shares, share_attention
from kvferry.kernels.triton_launch import current_device
from kvferry.kernels.triton_quantize import quantize_block

HEAD_DIMS = page.HEAD_DIMS
"""All that a page can hold."""
MAX_GROUP = 16
"""Query heads a KV head."""


class TritonKernels:
    """`PackedKernels` on a CUDA or HIP device; on the CPU under TRITON_INTERPRET=1, set before the import.

    Attention never synchronizes with the device, and can be captured in a CUDA graph. `quantize_block` does, once: it
    reads the flag that its kernel sets for numbers that are not finite. To read one flag for many layers, call
    `triton_quantize.quantize_block`.

    The arithmetic is fp16 with fp32 accumulation, whatever the query's dtype. Pool, sinks and tails must be contiguous
    behind their first two dimensions, block or slot and layer.
    """

    name = "triton/3"

    def __init__(self) -> None:
        self._device = current_device()

    def quantize_block(self, keys: Tensor, values: Tensor, page: PageFormat, *, sink_tokens: int, out: Tensor) -> None:
        if keys.stride(-1) != 1 or values.stride(-1) != 1 or not out.is_contiguous():
            raise ValueError("channels of K and V must be contiguous, and so must the pages")
        flag = torch.zeros(1, dtype=torch.int32, device=keys.device)
        quantize_block(keys, values, page, sink_tokens=sink_tokens, out=out, flag=flag)
        if flag.item():
            raise ValueError("K or V is not finite: the block is refused")

    def decode_attention(
        self,
        query: Tensor,
        batch: DecodeBatch,
        *,
        layer: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        _check_heads(query.shape[1], batch.layout.num_kv_heads)
        return decode_attention(
            query,
            batch,
            layer=layer,
            scale=scale,
            window=window,
            softcap=softcap,
            device=self._device,
        )

    def share_attention(
        self, query: Tensor, share: DecodeBatch, *, layer: int, scale: float, softcap: float | None = None
    ) -> Tensor:
        _check_heads(query.shape[1], share.layout.num_kv_heads)
        return share_attention(query, share, layer=layer, scale=scale, softcap=softcap, device=self._device)

    def merge_shares(self, shares: Tensor) -> Tensor:
        return merge_shares(shares)

    def chunk_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        prefix: PackedPrefix,
        *,
        layer: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        _check_heads(query.shape[0], keys.shape[0])
        return chunk_attention(
            query, keys, values, prefix, layer=layer, scale=scale, window=window, softcap=softcap, device=self._device
        )


def _check_heads(query_heads: int, kv_heads: int) -> None:
    if query_heads % kv_heads or query_heads // kv_heads > MAX_GROUP:
        raise ValueError(
            f"{query_heads} query heads on {kv_heads} KV heads: the Triton kernels share a KV head "
            f"between at most {MAX_GROUP}, evenly"
        )
