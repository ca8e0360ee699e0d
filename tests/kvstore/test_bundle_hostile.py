"""Bundles from an untrusted place: every damage and every lie ends in a typed error, and no wrong record comes out."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.bundles import Patched, digest, new_signer, payload_of, record_of, small_chain, write_bundle

from kvferry.kvstore import bundle_format as fmt
from kvferry.kvstore.bundle_errors import BundleDamaged, BundleRefused
from kvferry.kvstore.bundle_reader import BundleReader
from kvferry.kvstore.bundle_signature import UNSIGNED
from kvferry.kvstore.codec import encode_record
from kvferry.kvstore.errors import BlockCorrupt, InvalidRequest, KVStoreError

CHAIN = small_chain()


def read_all(path: Path) -> list[bytes]:
    with BundleReader(path) as bundle:
        return [bytes(record.payload) for record in bundle.records()]


def assert_refused(path: Path) -> str:
    with pytest.raises(BundleDamaged) as caught:
        read_all(path)
    message = str(caught.value)
    assert len(message) > 20
    for secret in (*(key.hex() for key in CHAIN.keys), CHAIN.namespace.tenant + "'"):
        assert secret not in message
    return message


@pytest.fixture(params=["signed", "unsigned", "no tokens"])
def patched(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Patched]]:
    signer = new_signer() if request.param == "signed" else None
    path = write_bundle(tmp_path / "small", CHAIN, signer=signer, tokens=request.param != "no tokens")
    file = Patched(path)
    yield path, file
    file.close()


def test_the_fixture_is_good(patched: tuple[Path, Patched]) -> None:
    assert read_all(patched[0]) == [payload_of(CHAIN, index) for index in range(3)]


def test_every_bit_flip_of_the_file_is_refused(patched: tuple[Path, Patched]) -> None:
    path, file = patched
    for position in range(len(file.content)):
        for bit in range(8):
            file.flip(position, bit)
            with pytest.raises(BundleDamaged):
                read_all(path)
        file.restore()
    assert read_all(path)


def test_every_truncation_is_refused(patched: tuple[Path, Patched]) -> None:
    path, file = patched
    for length in range(len(file.content)):
        file.write(file.content[:length])
        with pytest.raises(BundleDamaged):
            BundleReader(path)


@pytest.mark.parametrize("extra", [1, 64, 4096])
def test_bytes_after_the_end_are_refused(patched: tuple[Path, Patched], extra: int) -> None:
    path, file = patched
    file.write(file.content + bytes(extra))
    assert "its header says" in assert_refused(path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=600), with_magic=st.booleans(), declared=st.integers(0, 2**32 - 1))
def test_random_bytes_are_refused(tmp_path: Path, content: bytes, with_magic: bool, declared: int) -> None:
    path = tmp_path / "random"
    path.write_bytes(fmt.PREAMBLE.pack(fmt.MAGIC, 1, declared) * with_magic + content)
    assert_refused(path)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=100),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from([*fmt._FIELDS, "more"]), _VALUES, min_size=1, max_size=3))
def test_well_formed_headers_with_other_values_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """With the digest made anew, as an attacker would. Such a bundle may be possible, but then it is another one."""
    path = write_forged(tmp_path / "forged", lambda fields: {**fields, **changes})
    try:
        with BundleReader(path) as bundle:
            chain = bundle.header.chain
    except BundleDamaged:
        return
    # The model's name, the bf16 size and, where the keys are kept, the missing token ids are not in the keys.
    assert set(changes) <= {"model", "bf16_bytes_per_token", "tokens", "digest"}
    assert chain.keys == CHAIN.keys


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=40)), min_size=1, max_size=4),
    cut=st.integers(0, 200),
)
def test_random_edits_never_give_a_wrong_record(tmp_path: Path, edits: list[tuple[int, bytes]], cut: int) -> None:
    path = tmp_path / "edited"
    if not path.exists():
        write_bundle(path, CHAIN)
        (tmp_path / "good").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "good").read_bytes())
    for place, new in edits:
        start = place % len(content)
        content[start : start + len(new)] = new
    content = content[: len(content) - cut]
    path.write_bytes(content)
    try:
        payloads = read_all(path)
    except BundleDamaged:
        return
    assert content == (tmp_path / "good").read_bytes()
    assert payloads == [payload_of(CHAIN, index) for index in range(3)]


def header_fields(rows: list[fmt.RecordRow] | None = None) -> dict[str, Any]:
    return fmt._fields(CHAIN, rows or good_rows())


def good_rows() -> list[fmt.RecordRow]:
    _, offset = fmt.row_offsets(CHAIN)
    rows = []
    for index in range(3):
        record = record_of(CHAIN, index)
        rows.append(fmt.RecordRow(offset, len(record), hashlib.sha256(record).digest()))
        offset = fmt.aligned(offset + len(record))
    return rows


def write_forged(
    path: Path,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields,
    *,
    rows: list[fmt.RecordRow] | None = None,
    records: list[bytes] | None = None,
) -> Path:
    """A bundle with a right digest over whatever header `change` makes, and no signature."""
    fields = change(header_fields(rows))
    packed = msgpack.packb({**fields, "digest": fields.get("digest") or fmt._digest(fields)})
    head = fmt.PREAMBLE.pack(fmt.MAGIC, fmt.FORMAT_VERSION, len(packed)) + packed + UNSIGNED
    content = bytearray(head + bytes(-len(head) % 64))
    for index, record in enumerate(records or [record_of(CHAIN, i) for i in range(3)]):
        content += bytes(-len(content) % 64 if index else 0) + record
    path.write_bytes(content)
    return path


def test_the_forger_can_write_a_good_bundle(tmp_path: Path) -> None:
    """Else the tests below would test nothing."""
    path = write_forged(tmp_path / "forged")
    assert path.read_bytes() == write_bundle(tmp_path / "good", CHAIN).read_bytes()


def test_swapped_records_are_refused(tmp_path: Path) -> None:
    """The file's bytes in another order, the table as it was; then the table in the same other order."""
    records = [record_of(CHAIN, 0, 70), record_of(CHAIN, 2, 69), record_of(CHAIN, 1, 71)]
    assert "not those that the bundle's header names" in assert_refused(write_forged(tmp_path / "a", records=records))
    rows = good_rows()
    rows[1], rows[2] = (
        fmt.RecordRow(row.offset, len(record), hashlib.sha256(record).digest())
        for row, record in zip(good_rows()[1:], records[1:], strict=True)
    )
    assert "another block key" in assert_refused(write_forged(tmp_path / "b", rows=rows, records=records))


def test_another_chains_record_is_refused_even_when_the_table_names_it(tmp_path: Path) -> None:
    alien = small_chain(first_token=500)
    records = [record_of(CHAIN, 0), record_of(alien, 1), record_of(CHAIN, 2)]
    rows = good_rows()
    rows[1] = replace(rows[1], nbytes=len(records[1]), sha256=hashlib.sha256(records[1]).digest())
    assert "another block key" in assert_refused(write_forged(tmp_path / "a", rows=rows, records=records))


def test_a_record_of_another_position_is_refused(tmp_path: Path) -> None:
    """Right key, right checksum, but it says that it is another block."""
    liar = encode_record(
        key=CHAIN.keys[1],
        namespace=CHAIN.namespace.digest(),
        block_index=2,
        num_tokens=32,
        payload=[payload_of(CHAIN, 1)],
    )
    rows = good_rows()
    rows[1] = replace(rows[1], nbytes=len(liar), sha256=hashlib.sha256(liar).digest())
    records = [record_of(CHAIN, 0), liar, record_of(CHAIN, 2)]
    assert "says that it is block 2" in assert_refused(write_forged(tmp_path / "a", rows=rows, records=records))


@pytest.mark.parametrize(
    "offsets",
    [lambda o: [o[0], o[0], o[2]], lambda o: [o[0], o[0] + 64, o[2]], lambda o: [o[1], o[0], o[2]],
     lambda o: [0, o[1], o[2]], lambda o: [o[0], o[1] + 64, o[2] + 64], lambda o: [o[0], o[1], 2**64 - 1]],
    ids=["duplicate", "overlapping", "out of order", "in the head", "gap", "absurd"],
)  # fmt: skip
def test_other_offsets_are_refused(tmp_path: Path, offsets: Callable[[list[int]], list[int]]) -> None:
    rows = good_rows()
    changed = [replace(row, offset=offset) for row, offset in zip(rows, offsets([r.offset for r in rows]), strict=True)]
    assert "where it must" in assert_refused(write_forged(tmp_path / "a", rows=changed))


@pytest.mark.parametrize("nbytes", [0, 2**26 + 1, 2**63, 2**64 - 1])
def test_absurd_record_lengths_are_refused_before_anything_is_read(tmp_path: Path, nbytes: int) -> None:
    rows = [*good_rows()[:2], replace(good_rows()[2], nbytes=nbytes)]
    assert "allowed: 1 to" in assert_refused(write_forged(tmp_path / "a", rows=rows))


def test_a_length_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    rows = [*good_rows()[:2], replace(good_rows()[2], nbytes=60_000_000)]
    path = write_forged(tmp_path / "a", rows=rows)
    assert "its header says" in assert_refused(path)
    os.truncate(path, rows[2].offset + 60_000_000)  # sparse: costs the attacker nothing
    assert "not those that the bundle's header names" in assert_refused(path)


def test_absurd_header_lengths_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for declared in (fmt.MAX_HEADER_BYTES + 1, 2**32 - 1):
        path.write_bytes(fmt.PREAMBLE.pack(fmt.MAGIC, 1, declared))
        os.truncate(path, 2**33)
        assert "over the limit" in assert_refused(path)
    path.write_bytes(fmt.PREAMBLE.pack(fmt.MAGIC, 1, 5000) + bytes(4000))
    assert "inside the bundle's header" in assert_refused(path)


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    content = bytearray(write_bundle(tmp_path / "a", CHAIN).read_bytes())
    struct.pack_into("<I", content, 8, 2)
    (tmp_path / "a").write_bytes(content)
    assert "version 2; this kvferry reads version 1" in assert_refused(tmp_path / "a")


@pytest.mark.parametrize(
    "changes",
    [
        {"tenant": "other"},
        {"tenant": ""},
        {"weights": digest("other")},
        {"weights": b"short"},
        {"layout": 2},
        {"layout": -1},
        {"layout": True},
        {"block_size": 64},
        {"block_size": 0},
        {"num_tokens": 97},
        {"tokens": bytes(384)},
        {"tokens": bytes(383)},
        {"tokens": b""},
        {"records": b""},
        {"records": bytes(81)},
        {"model": b"bytes"},
        {"model": None},
        {"bf16_bytes_per_token": -1},
        {"bf16_bytes_per_token": 1.0},
    ],
)
def test_lies_in_the_header_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Its digest is right and nobody signed it: keys that are not those of its tokens and namespace give it away."""
    assert_refused(write_forged(tmp_path / "a", lambda fields: {**fields, **changes}))


def test_other_encodings_of_the_same_header_are_refused(tmp_path: Path) -> None:
    backwards = write_forged(tmp_path / "a", lambda fields: dict(reversed(fields.items())))
    assert "does not have its fields" in assert_refused(backwards)
    good = write_bundle(tmp_path / "b", CHAIN).read_bytes()
    name = good.index(b"\xa7a model")
    # The same string with a longer length prefix: msgpack reads it as the same header, and the digest is right for it.
    (length,) = struct.unpack_from("<I", good, 12)
    signed = fmt.PREAMBLE.pack(fmt.MAGIC, 1, length + 1) + good[16:name] + b"\xd9\x07" + good[name + 1 : 16 + length]
    end = fmt.head_bytes(16 + length)
    assert fmt.head_bytes(len(signed)) == end
    (tmp_path / "b").write_bytes((signed + UNSIGNED).ljust(end, b"\0") + good[end:])
    assert "one valid encoding" in assert_refused(tmp_path / "b")


@pytest.mark.parametrize(
    "packed",
    [
        b"\x91" * 5000,  # nesting
        b"\xdf\xff\xff\xff\xff",  # a map of 2**32 - 1
        b"\xc6\xff\xff\xff\xff",  # a bin of 2**32 - 1
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x81\xa1\xff\x01",  # a name that is not UTF-8
        b"\xc7\x04\x01abcd",
        b"",
    ],
)
def test_hostile_msgpack_is_refused(tmp_path: Path, packed: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(fmt.PREAMBLE.pack(fmt.MAGIC, 1, len(packed)) + packed + bytes(512))
    assert_refused(path)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises((BundleDamaged, OSError)):
            BundleReader(path)


def test_errors_are_in_the_stores_tree() -> None:
    assert issubclass(BundleDamaged, BlockCorrupt)
    assert issubclass(BundleRefused, InvalidRequest)
    assert issubclass(BundleDamaged, KVStoreError)
