"""Records: one encoding each, and every damage refused before a byte is returned."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import msgpack
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvferry.kvstore import BlockCorrupt, InvalidRequest, decode_record, encode_record
from kvferry.kvstore.codec import MAGIC, decode_moved_record, verify_record

_KEY = hashlib.sha256(b"key").digest()
_NAMESPACE = hashlib.sha256(b"namespace").digest()
_PAYLOAD = bytes(range(40))


def _encode(**changes: Any) -> bytes:
    fields: dict[str, Any] = dict(key=_KEY, namespace=_NAMESPACE, block_index=3, num_tokens=32, payload=[_PAYLOAD])
    return encode_record(**{**fields, **changes})


def _decode(buffer: bytes | bytearray | memoryview) -> bytes:
    record = decode_record(buffer, expected_key=_KEY, expected_namespace=_NAMESPACE)
    return bytes(record.payload)


def _assert_refused(buffer: bytes) -> None:
    with pytest.raises(BlockCorrupt) as node_error:
        verify_record(buffer, _KEY)
    with pytest.raises(BlockCorrupt) as client_error:
        _decode(buffer)
    with pytest.raises(BlockCorrupt) as quick_error:
        decode_moved_record(buffer, expected_key=_KEY, expected_namespace=_NAMESPACE)
    for error in (node_error, client_error, quick_error):
        assert len(str(error.value)) > 20
        assert _KEY.hex() not in str(error.value)


def test_round_trip() -> None:
    buffer = _encode(payload=[_PAYLOAD[:7], memoryview(_PAYLOAD)[7:30], b"", _PAYLOAD[30:]])
    assert buffer == _encode()
    record = decode_record(buffer, expected_key=_KEY, expected_namespace=_NAMESPACE)
    assert bytes(record.payload) == _PAYLOAD
    assert record.header.block_index == 3
    assert record.header.num_tokens == 32
    assert record.header.payload_bytes == 40
    assert verify_record(buffer, _KEY) == record.header
    assert decode_moved_record(buffer, expected_key=_KEY, expected_namespace=_NAMESPACE) == record


def test_golden_bytes() -> None:
    """The header of docs/layout.md: what is stored today is read tomorrow."""
    buffer = _encode()
    assert len(buffer) == 192 + 40
    assert hashlib.sha256(buffer).hexdigest() == "c27817180ce152d1096c26f4d2a179704880e39c76628013ad4d0aaa14ae3d8c"
    header = msgpack.unpackb(buffer[12 : 12 + struct.unpack_from("<I", buffer, 8)[0]])
    assert header[:6] == [2, _KEY, _NAMESPACE, 3, 32, 40]
    assert header[6] == hashlib.sha256(b"kvferry/record/2" + msgpack.packb(header[:6]) + _PAYLOAD).digest()
    assert header[7:] == [quick(header[:7], _PAYLOAD)]


def test_a_record_of_version_1_is_refused() -> None:
    """As format version 1 wrote it, its checksum right."""
    fields = (1, _KEY, _NAMESPACE, 3, 32, len(_PAYLOAD))
    checksum = hashlib.sha256(b"kvferry/record/1" + msgpack.packb(fields) + _PAYLOAD).digest()
    old = _forge((*fields, checksum))
    _assert_refused(old)
    with pytest.raises(BlockCorrupt, match="format version 1"):
        verify_record(old, _KEY)


def test_each_checksum_is_checked() -> None:
    """A record whose one checksum is right and whose other is not: the quick one covers the SHA-256."""
    fields = (2, _KEY, _NAMESPACE, 3, 32, len(_PAYLOAD))
    sha256 = hashlib.sha256(b"kvferry/record/2" + msgpack.packb(fields) + _PAYLOAD).digest()
    wrong_sha = (*fields, bytes(32))
    record = _forge((*wrong_sha, quick(wrong_sha, _PAYLOAD)))
    decode_moved_record(record, expected_key=_KEY, expected_namespace=_NAMESPACE)
    with pytest.raises(BlockCorrupt, match="checksum"):
        verify_record(record, _KEY)
    with pytest.raises(BlockCorrupt, match="checksum"):
        decode_record(record, expected_key=_KEY, expected_namespace=_NAMESPACE)
    _assert_refused(_forge((*fields, sha256, bytes(16))))


def test_payload_is_a_read_only_view_without_a_copy() -> None:
    buffer = bytearray(_encode())
    record = decode_record(buffer, expected_key=_KEY, expected_namespace=_NAMESPACE)
    assert record.payload.readonly
    assert record.payload.obj is buffer
    assert (len(buffer) - len(record.payload)) % 64 == 0


def test_payload_of_wider_items_counts_bytes() -> None:
    words = memoryview(struct.pack("<4I", 1, 2, 3, 4)).cast("I")
    assert _decode(_encode(payload=[words])) == words.tobytes()


def test_empty_payload() -> None:
    assert _decode(_encode(payload=[])) == b""


def test_every_bit_flip_is_refused() -> None:
    buffer = _encode()
    for position in range(len(buffer)):
        for bit in range(8):
            flipped = bytearray(buffer)
            flipped[position] ^= 1 << bit
            _assert_refused(bytes(flipped))


def test_every_truncation_is_refused() -> None:
    buffer = _encode()
    for length in range(len(buffer)):
        _assert_refused(buffer[:length])


@pytest.mark.parametrize("extra", range(1, 17))
def test_every_extension_is_refused(extra: int) -> None:
    for filler in (b"\0", b"\xff"):
        _assert_refused(_encode() + filler * extra)
        _assert_refused(filler * extra + _encode())


def test_splices_are_refused() -> None:
    """A genuine record under another key, and the head of one on the body of another."""
    keys = [hashlib.sha256(bytes([number])).digest() for number in range(16)]
    records = [_encode(key=key, payload=[key + _PAYLOAD]) for key in keys]
    start = len(records[0]) - 72
    accepted = 0
    for i, key in enumerate(keys):
        for j, record in enumerate(records):
            if i == j:
                accepted += verify_record(record, key).key == key
                continue
            for spliced in (record, records[i][:start] + record[start:]):
                with pytest.raises(BlockCorrupt):
                    verify_record(spliced, key)
    assert accepted == 16


def test_another_namespace_is_refused() -> None:
    buffer = _encode()
    verify_record(buffer, _KEY)
    with pytest.raises(BlockCorrupt, match="namespace"):
        decode_record(buffer, expected_key=_KEY, expected_namespace=bytes(32))


def quick(fields: Any, payload: bytes) -> bytes:
    """XXH3-128 over the record up to this checksum, and the payload."""
    packed = msgpack.packb((*fields, bytes(16)))[:-16]
    return xxhash.xxh3_128_digest(struct.pack("<8sI", MAGIC, len(packed) + 16) + packed + payload)


def _forge(fields: Any, payload: bytes = _PAYLOAD, padding: bytes | None = None) -> bytes:
    """A record with any header whose checksum, where there is room for one, is right."""
    if type(fields) is tuple and len(fields) == 6:
        text = b"kvferry/record/2" + msgpack.packb(fields) + payload
        fields = (*fields, hashlib.sha256(text).digest())
        fields = (*fields, quick(fields, payload))
    packed = fields if isinstance(fields, bytes) else msgpack.packb(fields)
    prefix = struct.pack("<8sI", MAGIC, len(packed)) + packed
    return prefix + (bytes(-len(prefix) % 64) if padding is None else padding) + payload


_GOOD = (2, _KEY, _NAMESPACE, 3, 32, len(_PAYLOAD))


def test_the_forger_forges_well() -> None:
    """The control of the tests below: with good fields the forged record is the real one."""
    assert _forge(_GOOD) == _encode()


@pytest.mark.parametrize(
    "fields",
    [
        (3, *_GOOD[1:]),
        (1, *_GOOD[1:]),
        (0, *_GOOD[1:]),
        (True, *_GOOD[1:]),
        (2.0, *_GOOD[1:]),
        (2, _KEY[:31], *_GOOD[2:]),
        (2, _KEY + b"\0", *_GOOD[2:]),
        (2, "k" * 32, *_GOOD[2:]),
        (2, _KEY, None, 3, 32, 40),
        (2, _KEY, _NAMESPACE, -1, 32, 40),
        (2, _KEY, _NAMESPACE, 1 << 32, 32, 40),
        (2, _KEY, _NAMESPACE, 3, 0, 40),
        (2, _KEY, _NAMESPACE, 3, False, 40),
        (2, _KEY, _NAMESPACE, 3, 32, 41),
        (2, _KEY, _NAMESPACE, 3, 32, 39),
        (2, _KEY, _NAMESPACE, 3, 32, 1 << 63),
        (2, _KEY, _NAMESPACE, 3, 32, [40]),
        (*_GOOD, bytes(32), bytes(16), 0),
        (*_GOOD, bytes(31), bytes(16)),
        (*_GOOD, bytes(32), bytes(15)),
        (*_GOOD, bytes(32)),
        (*_GOOD, None, None),
        _GOOD[:5],
        {"key": _KEY},
        [],
        None,
        7,
        msgpack.packb((*_GOOD, bytes(32), bytes(16)))[:-1],
        b"\x91" * 150,  # deep nesting
        b"\xc6\xff\xff\xff\xff",  # announces 4 GiB
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xc1",
        b"",
    ],
)
def test_impossible_headers_are_refused(fields: Any) -> None:
    _assert_refused(_forge(fields))


def test_non_canonical_headers_are_refused() -> None:
    good = msgpack.packb((*_GOOD, hashlib.sha256(b"").digest(), bytes(16)))
    canonical = _encode()
    length = struct.unpack_from("<I", canonical, 8)[0]
    header = canonical[12 : 12 + length]
    assert len(header) == len(good)
    wide = header.replace(b"\x03\x20\x28", b"\xcd\x00\x03\x20\x28", 1)  # 3 as a 16-bit integer
    assert msgpack.unpackb(wide) == msgpack.unpackb(header)
    _assert_refused(_forge(wide))
    _assert_refused(_forge(header, padding=b"\x01" + bytes(-(12 + length + 1) % 64)))
    _assert_refused(_forge(header + bytes(3)))
    assert _forge(header) == canonical


@pytest.mark.parametrize(
    "changes",
    [
        {"key": b"short"},
        {"namespace": bytes(33)},
        {"block_index": -1},
        {"num_tokens": 0},
        {"num_tokens": 1 << 32},
        {"key": bytearray(32)},
        {"max_record_bytes": 100},
    ],
)
def test_what_could_not_be_decoded_is_not_encoded(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="cannot encode"):
        _encode(**changes)


def test_size_limit_is_exact() -> None:
    size = len(_encode())
    buffer = _encode(max_record_bytes=size)
    verify_record(buffer, _KEY, max_record_bytes=size)
    with pytest.raises(InvalidRequest):
        _encode(max_record_bytes=size - 1)
    with pytest.raises(BlockCorrupt, match="over max_record_bytes"):
        verify_record(buffer, _KEY, max_record_bytes=size - 1)


def _refused(buffer: bytes) -> None:
    try:
        _decode(buffer)
    except BlockCorrupt:
        return
    assert buffer == _encode()


@given(st.binary(max_size=400))
def test_arbitrary_bytes(data: bytes) -> None:
    _refused(data)


@given(st.binary(max_size=200), st.integers(0, 255))
def test_arbitrary_header_bytes(data: bytes, length: int) -> None:
    _refused(struct.pack("<8sI", MAGIC, length) + data)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(_VALUES | st.sampled_from(_GOOD), min_size=5, max_size=9))
def test_arbitrary_header_fields(fields: list[Any]) -> None:
    _refused(_forge(tuple(fields)))


@given(st.data())
def test_arbitrary_edits(data: st.DataObject) -> None:
    buffer = bytearray(_encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(buffer)))
        end = data.draw(st.integers(start, min(len(buffer), start + 8)))
        buffer[start:end] = data.draw(st.binary(max_size=8))
    _refused(bytes(buffer))
