"""What a node answers, as Python objects; and the frames of a put of several records."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from kvferry.kvstore.backend import BackendStats
from kvferry.kvstore.config import FRAME_BYTES
from kvferry.proto import kvstore_pb2 as pb


class NodeStats(NamedTuple):
    """The node's answer to `stats`; see StatsReply in kvstore.proto."""

    records: int
    bytes: int
    capacity_bytes: int
    lookups: int
    hits: int
    misses: int
    puts: int
    evictions: int
    rejected: int
    corrupt: int
    backend: str
    tiers: tuple[BackendStats, ...] = ()


class ListedRecord(NamedTuple):
    """One record of a listing; see ListEntry in kvstore.proto. Nothing of it is verified."""

    key: bytes
    record_bytes: int
    tier: str
    pinned: bool
    age_s: float | None
    num_tokens: int
    block_index: int
    namespace: bytes


class PutManyOutcome(enum.Enum):
    """What came of one record of `StoreClient.put_many`."""

    STORED = "stored"
    EXISTED = "existed"
    FULL = "full"
    CORRUPT = "corrupt"


def node_stats(reply: pb.StatsReply) -> NodeStats:
    """The node's counters and sizes."""
    names = [name for name in NodeStats._fields if name != "tiers"]
    return NodeStats(**{name: getattr(reply, name) for name in names}, tiers=tuple(map(_tier_stats, reply.tiers)))


def listed_record(entry: pb.ListEntry) -> ListedRecord:
    """One entry of a listing."""
    return ListedRecord(
        key=entry.key,
        record_bytes=entry.record_bytes,
        tier=entry.tier,
        pinned=entry.pinned,
        age_s=entry.age_s if entry.HasField("age_s") else None,
        num_tokens=entry.num_tokens,
        block_index=entry.block_index,
        namespace=entry.namespace,
    )


def put_many_outcome(told: pb.PutManyReply.Outcome.ValueType) -> PutManyOutcome:
    """The outcome of one record; one that this client does not know counts as refused."""
    known: dict[pb.PutManyReply.Outcome.ValueType, PutManyOutcome] = {
        pb.PutManyReply.STORED: PutManyOutcome.STORED,
        pb.PutManyReply.EXISTED: PutManyOutcome.EXISTED,
        pb.PutManyReply.CORRUPT: PutManyOutcome.CORRUPT,
    }
    return known.get(told, PutManyOutcome.FULL)


async def put_many_frames(records: Sequence[tuple[bytes, bytes]]) -> AsyncIterator[pb.PutManyFrame]:
    """Records of at most FRAME_BYTES each, as many in a frame as it may hold."""
    frame, num_bytes = pb.PutManyFrame(), 0
    for key, record in records:
        if num_bytes + len(record) > FRAME_BYTES:
            yield frame
            frame, num_bytes = pb.PutManyFrame(), 0
        frame.records.add(key=key, record=record)
        num_bytes += len(record)
    yield frame


def _tier_stats(tier: pb.TierStats) -> BackendStats:
    return BackendStats(**{field.name: getattr(tier, field.name) for field in pb.TierStats.DESCRIPTOR.fields})
