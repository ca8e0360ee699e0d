"""Which nodes hold a block: rendezvous hashing of runs of consecutive blocks. Asks nobody, keeps nothing.

A block lives where the first block of its run lives. Runs grow with the depth of the chain,

    block   0 | 1 | 2 3 | 4 .. 7 | 8 .. 15 | 16 .. 31 | 32 .. 63 | 64 .. 95 | ...

because where a block lives can depend on the blocks before it only: what a run holds behind the point where two prompts
part lives on one node for both. With runs of 32 from the start, prompts that share nothing but their first block would
put 31 blocks each on one node.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

MAX_RUN_BLOCKS = 32


def run_start(index: int) -> int:
    """The index of the first block of the run that block `index` is in."""
    if index >= MAX_RUN_BLOCKS:
        return index - index % MAX_RUN_BLOCKS
    return 1 << (index.bit_length() - 1) if index else 0


def run_keys(chain: Sequence[bytes]) -> list[bytes]:
    """For each block of a chain, given from block 0 on, the key of its run's first block."""
    return [chain[run_start(index)] for index in range(len(chain))]


def ranked(run_key: bytes, nodes: Iterable[str]) -> list[str]:
    """`nodes` from the one that should hold the run to the last that would.

    Every pair of node and run has a score of its own, so a node that joins or leaves changes nobody else's order.
    """
    return sorted(nodes, key=lambda node: (_score(run_key, node), node), reverse=True)


def _score(run_key: bytes, node: str) -> bytes:
    return hashlib.blake2b(run_key + node.encode(), digest_size=8, person=b"kvferry/node").digest()
