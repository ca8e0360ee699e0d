"""Get and Put frames straight between records and the wire, without protobuf's copies of the chunk.

The bytes are those of GetFrame and PutFrame in kvstore.proto (a test compares them with protobuf's).
Through protobuf a chunk is copied when it is set, when the message is serialized and when it is read;
here it is copied once on the way out and not at all on the way in.
"""

from __future__ import annotations

from typing import NamedTuple

from kvferry.proto import kvstore_pb2 as pb

_GET_INDEX, _GET_RECORD_BYTES, _GET_CHUNK = 0x08, 0x10, 0x1A  # tags: field number and wire type
_PUT_CHUNK = 0x12


class GetChunk(NamedTuple):
    """What a reader needs of a GetFrame. `chunk` is a view into the message."""

    block: int  # index of the request's key
    record_bytes: int
    chunk: memoryview | bytes
    missing: bool


def encode_get_frame(index: int, record_bytes: int, chunk: memoryview) -> bytes:
    """The bytes of a GetFrame with a chunk. Zeros are left out, as protobuf does."""
    parts: list[bytes | memoryview] = [_varint_field(_GET_INDEX, index), _varint_field(_GET_RECORD_BYTES, record_bytes)]
    if chunk.nbytes:
        parts += [bytes((_GET_CHUNK,)), _varint(chunk.nbytes), chunk]
    return b"".join(parts)


def serialize_get_frame(frame: pb.GetFrame | bytes) -> bytes:
    """For the server: frames that are encoded already, and those that protobuf still has to encode."""
    return frame if isinstance(frame, bytes) else frame.SerializeToString()


def parse_get_frame(message: bytes) -> GetChunk:
    """Reads a GetFrame; raises protobuf's DecodeError for what is none."""
    position = index = record_bytes = 0
    try:
        if message[position] == _GET_INDEX:
            index, position = _read_varint(message, position + 1)
        if message[position] == _GET_RECORD_BYTES:
            record_bytes, position = _read_varint(message, position + 1)
        if message[position] == _GET_CHUNK:
            num_bytes, position = _read_varint(message, position + 1)
            if position + num_bytes == len(message) and index < 1 << 32 and record_bytes < 1 << 64:
                return GetChunk(index, record_bytes, memoryview(message)[position:], False)
    except IndexError:
        pass  # too short for a chunk
    # Anything else, such as a frame of a missing record: protobuf knows.
    frame = pb.GetFrame.FromString(message)
    return GetChunk(frame.index, frame.record_bytes, frame.chunk, frame.missing)


def encode_put_chunk(chunk: memoryview) -> bytes:
    """The bytes of a PutFrame with a chunk."""
    return b"".join((bytes((_PUT_CHUNK,)), _varint(chunk.nbytes), chunk))


def parse_put_frame(message: bytes) -> pb.PutFrame | memoryview:
    """The chunk of a PutFrame as a view into the message, or the frame where it is another kind."""
    try:
        if message[0] == _PUT_CHUNK:
            num_bytes, position = _read_varint(message, 1)
            if position + num_bytes == len(message):
                return memoryview(message)[position:]
    except IndexError:
        pass  # too short for a chunk
    return pb.PutFrame.FromString(message)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _varint_field(tag: int, value: int) -> bytes:
    return bytes((tag,)) + _varint(value) if value else b""


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    """The number and where it ends. Raises IndexError when it is cut or longer than 10 bytes."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise IndexError("a varint of more than 10 bytes")
