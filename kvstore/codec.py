"""The record: a block with its header, byte for byte what is stored and what is moved.

    magic (8) | header length, u32 little-endian (4) | msgpack header | zeros up to 64 n | payload

The header is a msgpack array of fixed length and types. A record has exactly one encoding: the
decoder re-encodes the header it read and compares, so every bit before the payload is covered
twice (by that and by the checksums). The payload starts at a multiple of 64 bytes.

Two checksums cover the same bytes. SHA-256 is checked where a record enters a node, where it comes up from a disk or
from Redis, and in bundles. XXH3-128, thirty times faster and over the SHA-256 as well, is checked there too, and alone
where a client gets a record from a node that has checked the other. Neither has a key: they find accidents, not
forgers.

Nothing here allocates by a size that was not checked, and no payload byte passes through msgpack.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack  # type: ignore[import-untyped]
import xxhash

from kvferry.kvstore.config import DEFAULT_MAX_RECORD_BYTES
from kvferry.kvstore.errors import BlockCorrupt, InvalidRequest
from kvferry.kvstore.key import DIGEST_BYTES, KEY_BYTES

FORMAT_VERSION = 2
MAGIC = b"kvferry\x01"
PAYLOAD_ALIGNMENT = 64
MAX_HEADER_BYTES = 192

_PREAMBLE = struct.Struct("<8sI")
_U32_MAX = (1 << 32) - 1
_CHECKSUM_CONTEXT = b"kvferry/record/2"
QUICK_BYTES = 16
_NUM_FIELDS = 8
_FIELD_TYPES = (int, bytes, bytes, int, int, int, bytes, bytes)
_PADDING = bytes(PAYLOAD_ALIGNMENT)
_packers = threading.local()

Buffer = bytes | bytearray | memoryview


class BlockHeader(NamedTuple):
    """What a record says about its block. `checksum` is SHA-256 over the fields before it and the payload,
    `quick_checksum` XXH3-128 over all bytes before it and the payload."""

    format_version: int
    key: bytes  # 32 bytes
    namespace: bytes  # 32 bytes, `Namespace.digest()`
    block_index: int  # position of the block in its chain
    num_tokens: int
    payload_bytes: int
    checksum: bytes  # 32 bytes
    quick_checksum: bytes  # 16 bytes


class Record(NamedTuple):
    """A verified record. `payload` is a read-only view into the buffer that was decoded."""

    header: BlockHeader
    payload: memoryview
    nbytes: int  # of the whole record, header included; 0 for one from this process's memory (`ReadCache`)


class RecordDigest:
    """The SHA-256 of a record whose payload comes part by part, in order.

    It is the `checksum` in the header that `encode_record` makes of the same fields and payload. Raises InvalidRequest
    for a field out of range.
    """

    def __init__(self, *, key: bytes, namespace: bytes, block_index: int, num_tokens: int, payload_bytes: int) -> None:
        fields = (FORMAT_VERSION, key, namespace, block_index, num_tokens, payload_bytes)
        problem = _header_problem(fields, DEFAULT_MAX_RECORD_BYTES)
        if problem is not None:
            raise InvalidRequest(f"no record can be like this: {problem}")
        self._digest = _digest(fields)

    def update(self, part: Buffer) -> None:
        self._digest.update(part)

    def digest(self) -> bytes:
        """The checksum over all parts so far: SHA-256, 32 bytes."""
        return self._digest.digest()


def encode_record(
    *,
    key: bytes,
    namespace: bytes,
    block_index: int,
    num_tokens: int,
    payload: Sequence[bytes | memoryview],
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
) -> bytes:
    """The record of one block; the parts of `payload` are joined in order, copied once.

    `key` comes from `block_keys`, `namespace` from `Namespace.digest()`. Raises InvalidRequest
    for a field out of range or a record over `max_record_bytes`.
    """
    parts = [memoryview(part).cast("B") for part in payload]
    header = BlockHeader(
        format_version=FORMAT_VERSION,
        key=key,
        namespace=namespace,
        block_index=block_index,
        num_tokens=num_tokens,
        payload_bytes=sum(part.nbytes for part in parts),
        checksum=bytes(DIGEST_BYTES),
        quick_checksum=bytes(QUICK_BYTES),
    )
    problem = _header_problem(_covered_fields(header), max_record_bytes)
    if problem is not None:
        raise InvalidRequest(f"cannot encode the record: {problem}")
    header = header._replace(checksum=_checksum(header, parts))
    quick_checksum = _quick_checksum(_encode_prefix(header), parts)
    prefix = _encode_prefix(header._replace(quick_checksum=quick_checksum))
    if len(prefix) + header.payload_bytes > max_record_bytes:
        raise InvalidRequest(
            f"cannot encode the record: {len(prefix) + header.payload_bytes} bytes are over "
            f"max_record_bytes = {max_record_bytes}"
        )
    return b"".join((prefix, *parts))


def decode_record(
    buffer: Buffer,
    *,
    expected_key: bytes,
    expected_namespace: bytes,
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
) -> Record:
    """Verifies everything, then returns the record without copying its payload.

    Raises BlockCorrupt, and nothing else, when the bytes are not exactly the one record that was
    encoded for this key and namespace.
    """
    view, header, start = _verify(buffer, expected_key, max_record_bytes)
    if _checksum(header, [view[start:]]) != header.checksum:
        raise BlockCorrupt("the record's checksum does not match its bytes")
    return _record_of(view, header, start, expected_namespace)


def decode_moved_record(
    buffer: Buffer,
    *,
    expected_key: bytes,
    expected_namespace: bytes,
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
) -> Record:
    """As `decode_record`, but for the SHA-256: for a record that comes straight from a node, which checked that.

    Raises BlockCorrupt, and nothing else, as `decode_record` does. A flipped bit, a cut, another key's record are found
    as surely; XXH3-128 misses one accident in 2^128.
    """
    view, header, start = _verify(buffer, expected_key, max_record_bytes)
    return _record_of(view, header, start, expected_namespace)


def verify_record(buffer: Buffer, key: bytes, *, max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES) -> BlockHeader:
    """The node's check: sizes, key and both checksums (a node does not know namespaces).

    Raises BlockCorrupt when one of them is wrong.
    """
    view, header, start = _verify(buffer, key, max_record_bytes)
    if _checksum(header, [view[start:]]) != header.checksum:
        raise BlockCorrupt("the record's checksum does not match its bytes")
    return header


def peek_header(head: bytes, *, max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES) -> BlockHeader | None:
    """What the first bytes of a record say of its block, unverified; None when they are no header."""
    try:
        return _read_header(memoryview(head), max_record_bytes)[0]
    except BlockCorrupt:
        return None


def record_size(head: bytes, key: bytes) -> int | None:
    """How long the record that starts with `head` must be; None when it is not one of this key."""
    header = peek_header(head, max_record_bytes=_U32_MAX)
    if header is None or header.key != key:
        return None
    return len(_encode_prefix(header)) + header.payload_bytes


def _record_of(view: memoryview, header: BlockHeader, start: int, expected_namespace: bytes) -> Record:
    if header.namespace != expected_namespace:
        raise BlockCorrupt("the record belongs to another namespace")
    return Record(header=header, payload=view[start:], nbytes=view.nbytes)


def _verify(buffer: Buffer, key: bytes, max_record_bytes: int) -> tuple[memoryview, BlockHeader, int]:
    """All checks but the SHA-256; where the payload starts."""
    view = memoryview(buffer) if type(buffer) is bytes else memoryview(buffer).cast("B").toreadonly()
    num_bytes = len(view)
    if num_bytes > max_record_bytes:
        raise BlockCorrupt(f"the record has {num_bytes} bytes, over max_record_bytes = {max_record_bytes}")
    header, packed = _read_header(view, max_record_bytes)
    _, own_key, _, _, _, payload_bytes, _, quick_checksum = header
    end = _PREAMBLE.size + len(packed)
    start = end + -end % PAYLOAD_ALIGNMENT
    if num_bytes != start + payload_bytes:
        raise BlockCorrupt(f"the record has {num_bytes} bytes, its header says {start + payload_bytes}")
    # The magic and the length before it were read, and have one encoding each.
    if packed != _pack(header) or view[end:start] != _PADDING[: start - end]:
        raise BlockCorrupt("the record's header is not in its one valid encoding")
    if own_key != key:
        raise BlockCorrupt("the record belongs to another block key")
    digest = xxhash.xxh3_128(view[: end - QUICK_BYTES])
    digest.update(view[start:])
    if digest.digest() != quick_checksum:
        raise BlockCorrupt("the record's checksum does not match its bytes")
    return view, header, start


def _read_header(view: memoryview, max_record_bytes: int) -> tuple[BlockHeader, bytes]:
    """The header and the bytes of its msgpack. Raises BlockCorrupt."""
    if view.nbytes < _PREAMBLE.size:
        raise BlockCorrupt(f"the record has {view.nbytes} bytes, too few for a header")
    magic, header_bytes = _PREAMBLE.unpack_from(view)
    if magic != MAGIC:
        raise BlockCorrupt("the bytes do not start like a record")
    if header_bytes > MAX_HEADER_BYTES or _PREAMBLE.size + header_bytes > view.nbytes:
        raise BlockCorrupt(f"the record's header length {header_bytes} is impossible")
    packed = bytes(view[_PREAMBLE.size : _PREAMBLE.size + header_bytes])
    try:
        fields = msgpack.unpackb(
            packed,
            use_list=False,
            raw=True,
            strict_map_key=True,
            max_str_len=0,
            max_bin_len=DIGEST_BYTES,
            max_array_len=_NUM_FIELDS,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise BlockCorrupt("the record's header is not valid msgpack") from error
    if type(fields) is tuple and tuple(map(type, fields)) == _FIELD_TYPES:
        # Nearly every header: checked by few calls, as this is a third of what reading a small record takes.
        version, key, namespace, block_index, num_tokens, payload_bytes, checksum, quick_checksum = fields
        if (
            version == FORMAT_VERSION
            and len(key) == KEY_BYTES
            and len(namespace) == DIGEST_BYTES
            and 0 <= block_index <= _U32_MAX
            and 1 <= num_tokens <= _U32_MAX
            and 0 <= payload_bytes <= max_record_bytes
            and len(checksum) == DIGEST_BYTES
            and len(quick_checksum) == QUICK_BYTES
        ):
            return BlockHeader._make(fields), packed
    raise _why_not(fields, max_record_bytes)


def _why_not(fields: Any, max_record_bytes: int) -> BlockCorrupt:
    """What is wrong with the fields of a header."""
    if type(fields) is tuple and fields and fields[0] == 1:
        return BlockCorrupt("the record is of format version 1, which this kvferry does not read")
    if type(fields) is not tuple or len(fields) != _NUM_FIELDS:
        return BlockCorrupt(f"the record's header does not have its {_NUM_FIELDS} fields")
    _, _, _, _, _, _, checksum, quick_checksum = fields
    if type(checksum) is not bytes or len(checksum) != DIGEST_BYTES:
        return BlockCorrupt(f"the record's checksum is not {DIGEST_BYTES} bytes")
    if type(quick_checksum) is not bytes or len(quick_checksum) != QUICK_BYTES:
        return BlockCorrupt(f"the record's quick checksum is not {QUICK_BYTES} bytes")
    return BlockCorrupt(f"the record's header is impossible: {_header_problem(fields[:6], max_record_bytes)}")


def _header_problem(fields: tuple[Any, ...], max_record_bytes: int) -> str | None:
    """Why these six fields cannot stand in a header, or None when they can."""
    version, key, namespace, block_index, num_tokens, payload_bytes = fields
    if type(version) is not int or version != FORMAT_VERSION:
        return f"the format version is not {FORMAT_VERSION}"
    if type(key) is not bytes or len(key) != KEY_BYTES:
        return f"the key is not {KEY_BYTES} bytes"
    if type(namespace) is not bytes or len(namespace) != DIGEST_BYTES:
        return f"the namespace is not {DIGEST_BYTES} bytes"
    if type(block_index) is not int or not 0 <= block_index <= _U32_MAX:
        return f"block_index is not an integer from 0 to {_U32_MAX}"
    if type(num_tokens) is not int or not 1 <= num_tokens <= _U32_MAX:
        return f"num_tokens is not an integer from 1 to {_U32_MAX}"
    if type(payload_bytes) is not int or not 0 <= payload_bytes <= max_record_bytes:
        return f"payload_bytes is not an integer from 0 to {max_record_bytes}"
    return None


def _covered_fields(header: BlockHeader) -> tuple[Any, ...]:
    return header[:6]


def _checksum(header: BlockHeader, payload: Sequence[bytes | memoryview]) -> bytes:
    digest = _digest(_covered_fields(header))
    for part in payload:
        digest.update(part)
    return digest.digest()


def _digest(covered_fields: tuple[Any, ...]) -> hashlib._Hash:
    # msgpack is self-delimiting and payload_bytes is among the fields, so the hashed bytes can
    # be split in one way only.
    return hashlib.sha256(_CHECKSUM_CONTEXT + _pack(covered_fields))


def _quick_checksum(prefix: bytes, payload: Sequence[bytes | memoryview]) -> bytes:
    """Of the prefix up to the checksum itself, which is the last of the fields, and the payload."""
    end = _PREAMBLE.size + _PREAMBLE.unpack_from(prefix)[1] - QUICK_BYTES
    digest = xxhash.xxh3_128(prefix[:end])
    for part in payload:
        digest.update(part)
    return digest.digest()


def _encode_prefix(header: BlockHeader) -> bytes:
    packed = _pack(header)
    prefix = _PREAMBLE.pack(MAGIC, len(packed)) + packed
    return prefix + bytes(-len(prefix) % PAYLOAD_ALIGNMENT)


def _pack(fields: tuple[Any, ...]) -> bytes:
    """`msgpack.packb` without a new Packer and its buffer of 256 KiB, which take three quarters of its time."""
    packer = getattr(_packers, "own", None)
    if packer is None:
        packer = _packers.own = msgpack.Packer()
    packed: bytes = packer.pack(fields)
    return packed
