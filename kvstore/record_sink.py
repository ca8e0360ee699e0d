"""Records that come into a node: room for them while they come, checks, and the backend. What Put, PutMany and the bulk
port have in common."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.kvstore.backend import Backend
from kvferry.kvstore.codec import verify_record
from kvferry.kvstore.errors import BlockCorrupt, StoreFull
from kvferry.kvstore.node_answers import PutManyOutcome
from kvferry.kvstore.node_counters import NodeCounters
from kvferry.kvstore.staging import Staging


class Room:
    """What the node wants of the records that a client offers, and the room for them. Only the node's loop uses it."""

    def __init__(self) -> None:
        self.outcomes: list[PutManyOutcome | None] = []
        """By record; None: it is to be sent."""
        self.refusal = ""
        """Why some get FULL; else empty."""
        self.num_bytes = 0
        """Reserved."""
        self.is_given_back = False


class RecordSink:
    """Takes records. All but `check` is for the node's event loop."""

    def __init__(self, backend: Backend, staging: Staging, counters: NodeCounters, *, max_record_bytes: int) -> None:
        self._backend = backend
        self._staging = staging
        self._counters = counters
        self._max_record_bytes = max_record_bytes

    async def reserve(self, room: Room, keys: Sequence[bytes], lengths: Sequence[int]) -> None:
        """Fills `room`: with the records that are not there and fit. Raises StoreUnavailable."""
        present = await self._backend.contains(keys)
        if room.is_given_back:
            return  # whoever asked has gone meanwhile
        for is_present, length in zip(present, lengths, strict=True):
            if is_present:
                room.outcomes.append(PutManyOutcome.EXISTED)
                continue
            try:
                self._staging.reserve(length)
            except StoreFull as error:
                room.refusal = str(error)
                room.outcomes.append(PutManyOutcome.FULL)
                self._counters.rejected += 1
            else:
                room.num_bytes += length
                room.outcomes.append(None)

    def give_back(self, room: Room) -> None:
        """The records that it was for have come, or will not."""
        self._staging.release(room.num_bytes)
        room.num_bytes, room.is_given_back = 0, True

    def check(self, key: bytes, record: bytes) -> None:
        """Everything a node checks of a record; from any thread. Raises BlockCorrupt."""
        verify_record(record, key, max_record_bytes=self._max_record_bytes)

    def passes(self, key: bytes, record: bytes) -> bool:
        """Whether `check` raises nothing."""
        try:
            self.check(key, record)
        except BlockCorrupt:
            return False
        return True

    async def put(self, key: bytes, record: bytes) -> PutManyOutcome:
        """Makes a checked record visible. Raises StoreFull and StoreUnavailable."""
        if (await self._backend.contains([key]))[0]:
            return PutManyOutcome.EXISTED
        try:
            stored = await self._backend.put(key, record)
        except StoreFull:
            self._counters.rejected += 1
            raise
        if not stored:
            return PutManyOutcome.EXISTED
        self._counters.puts += 1
        return PutManyOutcome.STORED

    async def put_all(
        self, room: Room, records: Sequence[tuple[bytes, bytes | None]]
    ) -> tuple[list[PutManyOutcome], str]:
        """What came of the records that the room was for, and why the first was refused, if one was; then it is free.
        A record is None that was not intact. Raises StoreUnavailable."""
        outcomes: list[PutManyOutcome] = []
        refusal = ""
        try:
            for key, record in records:
                if record is None:
                    self._counters.rejected += 1
                    outcomes.append(PutManyOutcome.CORRUPT)
                    continue
                try:
                    outcomes.append(await self.put(key, record))
                except StoreFull as error:
                    refusal = refusal or str(error)
                    outcomes.append(PutManyOutcome.FULL)
        finally:
            self.give_back(room)
        return outcomes, refusal
