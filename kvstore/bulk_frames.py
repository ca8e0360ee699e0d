"""What goes over a bulk connection, byte for byte. Numbers are little-endian.

    client   hello    magic (8) | session (40), which is for gets or for puts
    node     ready    one byte, 1

Gets, one after the other:

    client   request  number of keys (4) | timeout, ms (4) | lease id (8) | length of the request id (4)
                      | the request id, for the node's log | keys, 32 bytes each
    node     reply    frames: index of the first key (4) | kind (4) | number (8) | body

The body of a RECORDS frame is the lengths of `number` records, 8 bytes each, then the records, end to end. A FAILED
frame's is a message of `number` bytes. A reply ends with the last key's record, or before it with a MISSING or a
FAILED frame; then the next request may come.

Puts, one after the other:

    client   request  number of records (4) | 0 (4) | 0 (8) | length of the request id (4)
                      | the request id | keys, 32 bytes each | lengths of the records, 8 bytes each
    node     answers  an ANSWERS frame: an answer for each record, one byte each
    client            the records that were answered with WANTED, end to end; nothing where there are none
    node     answers  another ANSWERS frame, for those

The index of an ANSWERS frame is the length of a message, about a record that was refused, which follows the answers.
Instead of one a FAILED frame may come; then the connection ends, and some of the records may have been stored.

The node closes the connection on anything else, and when it has been idle or open for too long.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence

from kvferry.kvstore.errors import BlockNotFound, InvalidRequest, KVStoreError, StoreUnavailable

MAGIC = b"kvfbulk\x02"
SESSION_BYTES = 40
HELLO_BYTES = len(MAGIC) + SESSION_BYTES
READY = b"\x01"
REQUEST = struct.Struct("<IIQI")
HEADER = struct.Struct("<IIQ")
LENGTH_BYTES = 8
MAX_RECORDS = 64
"""In one frame, and in one put."""
MAX_FAILURE_BYTES = 1024
MAX_REQUEST_ID_BYTES = 128
_MAX_TIMEOUT_MS = (1 << 32) - 1


class Kind(enum.IntEnum):
    """What a frame of a reply is."""

    RECORDS = 1
    MISSING = 2
    UNAVAILABLE = 3  # FAILED: the bytes are a message
    INVALID = 4  # FAILED: the same, and the node closes the connection
    ANSWERS = 5


class Answer(enum.IntEnum):
    """What a node says of a record that is put."""

    WANTED = 0
    STORED = 1
    EXISTED = 2
    FULL = 3
    CORRUPT = 4


def encode_request(keys: Sequence[bytes], *, lease_id: int, timeout_s: float, request_id: str = "") -> bytes:
    """A get of these keys."""
    timeout_ms = min(max(int(timeout_s * 1000), 0), _MAX_TIMEOUT_MS)
    told = request_id.encode("ascii")
    return REQUEST.pack(len(keys), timeout_ms, lease_id, len(told)) + told + b"".join(keys)


def encode_put_request(keys: Sequence[bytes], lengths: Sequence[int], *, request_id: str = "") -> bytes:
    """A put of the records of these keys and lengths."""
    told = request_id.encode("ascii")
    head = REQUEST.pack(len(keys), 0, 0, len(told)) + told
    return b"".join((head, *keys, struct.pack(f"<{len(lengths)}Q", *lengths)))


def encode_answers(answers: Sequence[Answer], message: str = "") -> bytes:
    """An ANSWERS frame."""
    told = message.encode()[:MAX_FAILURE_BYTES]
    return HEADER.pack(len(told), Kind.ANSWERS, len(answers)) + bytes(answers) + told


def encode_records_head(index: int, lengths: Sequence[int]) -> bytes:
    """What stands before records of these lengths, the first of which is that of keys[index]."""
    return struct.pack(f"<IIQ{len(lengths)}Q", index, Kind.RECORDS, len(lengths), *lengths)


def decode_lengths(body: bytes) -> tuple[int, ...]:
    """The lengths at the start of a RECORDS frame's body."""
    return struct.unpack(f"<{len(body) // LENGTH_BYTES}Q", body)


def encode_missing(index: int) -> bytes:
    """The last frame of a reply that lacks keys[index]."""
    return HEADER.pack(index, Kind.MISSING, 0)


def encode_failure(index: int, error: KVStoreError) -> bytes:
    """The last frame of a reply that cannot go on."""
    kind = Kind.INVALID if isinstance(error, InvalidRequest) else Kind.UNAVAILABLE
    message = str(error).encode()[:MAX_FAILURE_BYTES]
    return HEADER.pack(index, kind, len(message)) + message


def missing(index: int, num_keys: int) -> BlockNotFound:
    """What a client raises at a MISSING frame."""
    return BlockNotFound(f"block {index} of {num_keys} is not in the store; recompute from it", index=index)


def failure(kind: int, message: bytes) -> KVStoreError:
    """What a client raises at a FAILED frame."""
    text = message.decode(errors="replace")
    return InvalidRequest(text) if kind == Kind.INVALID else StoreUnavailable(text)
