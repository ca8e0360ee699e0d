"""Which decode worker and which prefill worker serve a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvferry.deploy.worker_pool import WorkerPair


class Router(Protocol):
    def pick(self, pairs: Sequence[WorkerPair], token_ids: Sequence[int]) -> WorkerPair:
        """One of `pairs`, which is not empty. Must be quick and must not change the workers."""
        ...


class LeastOutstanding:
    """The workers with the fewest requests; among equals, the one that has rested longest."""

    def pick(self, pairs: Sequence[WorkerPair], token_ids: Sequence[int]) -> WorkerPair:
        return min(pairs, key=_load)


def _load(pair: WorkerPair) -> tuple[int, int, int, int]:
    decode, prefill = pair
    return (
        decode.num_outstanding,
        prefill.num_outstanding if prefill else 0,
        decode.last_used,
        prefill.last_used if prefill else 0,
    )
