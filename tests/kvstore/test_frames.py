"""The hand-made frames are protobuf's, byte for byte, and garbage is refused as protobuf refuses it."""

from __future__ import annotations

import contextlib

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvferry.kvstore.frames import encode_get_frame, encode_put_chunk, parse_get_frame, parse_put_frame
from kvferry.proto import kvstore_pb2 as pb


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=300))
def test_get_frames(index: int, record_bytes: int, chunk: bytes) -> None:
    frame = pb.GetFrame(index=index, record_bytes=record_bytes, chunk=chunk)
    message = frame.SerializeToString()
    assert encode_get_frame(index, record_bytes, memoryview(chunk)) == message
    parsed = parse_get_frame(message)
    assert (parsed.block, parsed.record_bytes, bytes(parsed.chunk), parsed.missing) == (
        index,
        record_bytes,
        chunk,
        False,
    )


@given(st.integers(0, 2**32 - 1))
def test_frames_of_missing_records(index: int) -> None:
    parsed = parse_get_frame(pb.GetFrame(index=index, missing=True).SerializeToString())
    assert (parsed.block, bytes(parsed.chunk), parsed.missing) == (index, b"", True)


@given(st.binary(min_size=1, max_size=300))
def test_put_chunks(chunk: bytes) -> None:
    message = pb.PutFrame(chunk=chunk).SerializeToString()
    assert encode_put_chunk(memoryview(chunk)) == message
    parsed = parse_put_frame(message)
    assert isinstance(parsed, memoryview) and bytes(parsed) == chunk
    begin = pb.PutFrame(begin=pb.PutBegin(key=bytes(32), record_bytes=len(chunk)))
    assert parse_put_frame(begin.SerializeToString()) == begin


@given(st.binary(max_size=60))
def test_garbage_is_what_protobuf_makes_of_it(message: bytes) -> None:
    for parse, kind in ((parse_get_frame, pb.GetFrame), (parse_put_frame, pb.PutFrame)):
        expected = None
        with contextlib.suppress(DecodeError):
            expected = kind.FromString(message)
        if expected is None:
            with pytest.raises(DecodeError):
                parse(message)
            continue
        parsed = parse(message)
        if isinstance(expected, pb.GetFrame):
            assert not isinstance(parsed, pb.PutFrame | memoryview)
            assert (parsed.block, parsed.record_bytes, bytes(parsed.chunk), parsed.missing) == (
                expected.index,
                expected.record_bytes,
                expected.chunk,
                expected.missing,
            )
        else:
            assert (bytes(parsed) if isinstance(parsed, memoryview) else parsed.chunk) == expected.chunk
