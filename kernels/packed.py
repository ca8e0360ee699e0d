"""What the kernels take, and the interface that every implementation of them fulfils."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.page import PageFormat


@dataclass(frozen=True, kw_only=True)
class PackedPrefix:
    """The packed blocks before a prefill chunk, of one sequence.

    pool: uint8 [num_blocks, block_bytes]; table: int32 [n], block ids in order of position;
    sinks: fp16 [layer, kv_head, K|V, sink_tokens, D]. Nothing is copied.
    """

    layout: BlockLayout
    pool: Tensor
    table: Tensor
    sinks: Tensor


@dataclass(frozen=True, kw_only=True)
class DecodeBatch:
    """The packed caches of a batch of B sequences, for one decode step.

    A sequence's context is its sinks, `num_blocks` packed blocks (whose first tokens are the sinks again, masked) and
    `tail_lens` fp16 tokens, the newest of which is the current one. While `num_blocks` is 0 the sinks are in the tail.
    """

    layout: BlockLayout
    pool: Tensor
    """uint8 [num_blocks, block_bytes]"""
    sinks: Tensor
    """fp16 [slot, layer, kv_head, K|V, sink_tokens, D]"""
    tails: Tensor
    """fp16 [slot, layer, K|V, kv_head, block_size, D]"""
    block_tables: Tensor
    """int32 [B, max_blocks]"""
    num_blocks: Tensor
    """int32 [B]"""
    slots: Tensor
    """int32 [B]: row of `sinks` and `tails`"""
    tail_lens: Tensor
    """int32 [B], at least 1; in a share of a context (`share_attention`) also 0"""


class PackedKernels(Protocol):
    """Quantize-and-pack and attention on packed blocks.

    Every implementation gives a row the same bits whatever else is in the call: the result for one query depends on
    its own sequence alone (design: batch invariance).
    """

    @property
    def name(self) -> str:
        """Names the implementation; part of the numerics class."""
        ...

    def quantize_block(self, keys: Tensor, values: Tensor, page: PageFormat, *, sink_tokens: int, out: Tensor) -> None:
        """Quantizes one layer of one block into `out`.

        keys, values: fp16 [H, block_size, D], after RoPE; out: uint8 [H, page, page_bytes], contiguous.
        `sink_tokens` first tokens are left out of the fit (block 0 only, else 0).
        Raises ValueError when K or V is not finite: such a block must never be published.
        """
        ...

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
        """query: [B, Hq, D] -> [B, Hq, D] in the query's dtype.

        `window`: how many tokens a query sees, its own included (None: all before it; sinks outside the window are
        not seen either). `softcap`: scaled scores s become softcap * tanh(s / softcap).
        """
        ...

    def share_attention(
        self, query: Tensor, share: DecodeBatch, *, layer: int, scale: float, softcap: float | None = None
    ) -> Tensor:
        """`decode_attention` over a share of each context, for `merge_shares`.

        query: [B, Hq, D] -> fp32 [B, Hq, D + 1]: the output over the share alone, then the base-2 logarithm of the sum
        of its scores' exponentials. An empty share has zeros and -inf.

        Of a context that is cut into shares, one has the sequence's first block, the sinks and the tail. The others
        have whole blocks only: their `sinks` are of 0 tokens and their `tail_lens` 0. There is no window, for positions
        in a share are not those in the sequence.
        """
        ...

    def merge_shares(self, shares: Tensor) -> Tensor:
        """The attention of which `share_attention` gave the R shares: fp32 [R, B, Hq, D + 1] -> fp32 [B, Hq, D].

        In the order of shares, and a row depends on its own shares alone. An empty share changes no bit; a row of
        which all are empty is 0.
        """
        ...

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
        """A prefill chunk: packed prefix, then the chunk itself in full precision, causal.

        `window` and `softcap` as in `decode_attention`.

        query: [Hq, n, D]; keys, values: fp16 [H, n, D]; returns [Hq, n, D] in the query's dtype.
        """
        ...
