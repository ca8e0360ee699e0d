"""The records of one get, from the backend, checked where they must be: what Get and the bulk port send."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from functools import partial

from kvferry.kvstore.backend import Backend
from kvferry.kvstore.codec import verify_record
from kvferry.kvstore.config import MIB
from kvferry.kvstore.errors import BlockCorrupt, StoreUnavailable
from kvferry.kvstore.node_counters import NodeCounters
from kvferry.kvstore.verifier import Verifier

_log = logging.getLogger(__name__)

# A get reads this much from the backend at a time (one round trip to Redis), going by the size of
# the last record, and holds two such reads. More only holds memory: the wire is slower than the backend.
_READ_AHEAD_BYTES = 8 * MIB
_READ_AHEAD_KEYS = 64


class RecordSource:
    """Reads ahead and verifies. A damaged record is deleted and counts as missing."""

    def __init__(self, backend: Backend, verifier: Verifier, counters: NodeCounters, *, max_record_bytes: int) -> None:
        self._backend = backend
        self._verifier = verifier
        self._counters = counters
        self._max_record_bytes = max_record_bytes

    async def read(self, keys: list[bytes], lease_id: int) -> AsyncGenerator[list[bytes | None]]:
        """The records of `keys` in order, some at a time; None for the first missing one, which is the last.

        Renews the lease with each read. Raises StoreUnavailable. Close it when leaving it early.
        """
        leases = self._backend.leases
        if leases is not None and not leases.renew(lease_id):
            # No lease, so no Lookup counted this use of the chain.
            await self._backend.contains(keys)
        start, num_ahead = 0, 1
        reading = asyncio.ensure_future(self._backend.get(keys[:1]))
        try:
            while start < len(keys):
                records = await reading
                if leases is not None:
                    leases.renew(lease_id)
                if records[0]:  # a damaged one may be empty
                    num_ahead = max(1, min(_READ_AHEAD_BYTES // len(records[0]), _READ_AHEAD_KEYS))
                end = start + len(records)
                if end < len(keys) and None not in records:
                    # The next records come from disk or Redis while these go out.
                    reading = asyncio.ensure_future(self._backend.get(keys[end : end + num_ahead]))
                if self._backend.hands_out_verified and all(records):
                    self._counters.hits += len(records)
                    yield records
                else:
                    for key, record in zip(keys[start:end], records, strict=True):
                        if record is None or not await self._is_intact(key, record):
                            self._counters.misses += 1
                            yield [None]
                            return
                        self._counters.hits += 1
                        yield [record]
                start = end
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _is_intact(self, key: bytes, record: bytes) -> bool:
        if record and self._backend.hands_out_verified:
            return True  # the client checks it again, on the other side of the wire; nothing would be no frame at all
        check = partial(verify_record, record, key, max_record_bytes=self._max_record_bytes)
        try:
            await self._verifier.run(len(record), check)
        except BlockCorrupt as error:
            self._counters.corrupt += 1
            _log.warning("deleting a damaged record: %s", error)
            with contextlib.suppress(StoreUnavailable):  # then the next reader finds it damaged again
                await self._backend.delete([key])
            return False
        return True
