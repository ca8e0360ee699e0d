"""One put over a bulk connection, at the node: what is wanted, the records, their checks, what came of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from kvferry.kvstore.bulk_frames import LENGTH_BYTES, MAX_RECORDS, Answer, decode_lengths, encode_answers
from kvferry.kvstore.bulk_socket import receive_exactly
from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.errors import BlockCorrupt, InvalidRequest, StoreUnavailable
from kvferry.kvstore.node_answers import PutManyOutcome
from kvferry.kvstore.record_sink import RecordSink, Room

T = TypeVar("T")

ANSWERS = {
    PutManyOutcome.STORED: Answer.STORED,
    PutManyOutcome.EXISTED: Answer.EXISTED,
    PutManyOutcome.FULL: Answer.FULL,
    PutManyOutcome.CORRUPT: Answer.CORRUPT,
}


def take_records(
    connection: socket.socket,
    sink: RecordSink,
    keys: list[bytes],
    loop: asyncio.AbstractEventLoop,
    config: NodeConfig,
) -> None:
    """Serves a put whose keys have come. Each record is visible once it is whole and checked, and not before.

    Raises InvalidRequest for one that breaks a limit, StoreUnavailable when the backend or the loop does not answer,
    BlockingIOError when the records do not come within `staging_timeout_s`, EOFError and OSError when the client goes.
    """
    deadline = time.monotonic() + config.staging_timeout_s
    if len(keys) > MAX_RECORDS:
        raise InvalidRequest(f"a put over the bulk port names {MAX_RECORDS} records at most, not {len(keys)}")
    lengths = decode_lengths(receive_exactly(connection, len(keys) * LENGTH_BYTES, deadline))
    limit = config.max_record_bytes
    if not all(1 <= length <= limit for length in lengths):
        raise InvalidRequest(
            f"a record must have 1 to {limit} bytes; use a smaller block size or raise max_record_bytes on node and "
            "clients"
        )
    room = Room()
    try:
        _on_loop(sink.reserve(room, keys, lengths), loop, deadline)
        first = [Answer.WANTED if outcome is None else ANSWERS[outcome] for outcome in room.outcomes]
        connection.sendall(encode_answers(first, room.refusal))
        if Answer.WANTED not in first:
            return
        records: list[tuple[bytes, bytes | None]] = []
        damage = ""
        for key, length, answer in zip(keys, lengths, first, strict=True):
            if answer is not Answer.WANTED:
                continue
            record = receive_exactly(connection, length, deadline)
            try:
                sink.check(key, record)  # in this thread: hashing a large one does not hold the GIL
                records.append((key, record))
            except BlockCorrupt as error:
                records.append((key, None))
                damage = damage or str(error)
        outcomes, refusal = _on_loop(sink.put_all(room, records), loop, deadline)
        connection.sendall(encode_answers([ANSWERS[outcome] for outcome in outcomes], damage or refusal))
    finally:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(sink.give_back, room)


def _on_loop(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop, deadline: float) -> T:
    """What `work` returns or raises, run on the node's loop. Raises StoreUnavailable after the deadline, or when the
    loop has ended."""
    try:
        future = asyncio.run_coroutine_threadsafe(work, loop)
    except RuntimeError as error:
        work.close()
        raise StoreUnavailable("the node is ending") from error
    try:
        return future.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError as error:
        future.cancel()
        raise StoreUnavailable("the node's backend does not answer") from error
