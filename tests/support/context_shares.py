"""Cuts a decode batch into shares of each context, as the ranks of a decode worker hold them."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvferry.kernels.packed import DecodeBatch


def cut_batch(batch: DecodeBatch, num_shares: int) -> list[DecodeBatch]:
    """Block i goes to share i mod `num_shares`; sinks and tails to share 0. Tables of the others begin with what nobody
    may read."""
    shares = []
    for rank in range(num_shares):
        tables = [
            batch.block_tables[row, :count].tolist()[rank::num_shares]
            for row, count in enumerate(batch.num_blocks.tolist())
        ]
        width = max(1, *(len(table) for table in tables))
        padded = torch.tensor([table + [1 << 20] * (width - len(table)) for table in tables], dtype=torch.int32)
        share = replace(
            batch,
            block_tables=padded.to(batch.pool.device),
            num_blocks=torch.tensor([len(table) for table in tables], dtype=torch.int32, device=batch.pool.device),
        )
        if rank:
            share = replace(share, sinks=share.sinks[..., :0, :], tail_lens=torch.zeros_like(share.tail_lens))
        shares.append(share)
    return shares
