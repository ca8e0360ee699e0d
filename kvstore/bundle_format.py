"""The head of a bundle, byte for byte; docs/bundle.md draws it.

    magic (8) | version, u32 | header length h, u32 | msgpack header (h) | signature (96) | zeros up to 64 n | records

The header is a msgpack map with its fields in one order, re-encoded and compared after reading, so a header has exactly
one encoding. The record table is one bin of fixed-width rows: the head's size follows from the number of records, so
records can be written before their digests are known. Where each record lies follows from the lengths before it, and
any other offset is refused: records cannot overlap, and no byte of the file is without an owner.

Nothing is allocated by a size that was not checked first, and no record passes through msgpack.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]

from kvferry.kvstore.bundle_chain import MAX_BLOCKS, MAX_TOKENS, Chain, chain_problem
from kvferry.kvstore.bundle_errors import BundleDamaged
from kvferry.kvstore.config import DEFAULT_MAX_RECORD_BYTES
from kvferry.kvstore.key import DIGEST_BYTES, KEY_BYTES, MAX_TENANT_BYTES, Namespace

MAGIC = b"kvbundle"
FORMAT_VERSION = 1
ALIGNMENT = 64
SIGNATURE_BYTES = 96
PREAMBLE = struct.Struct("<8sII")
ROW = struct.Struct(f"<{KEY_BYTES}sQQ{DIGEST_BYTES}s")
"""A record in the table: block key, offset, length, SHA-256 of its bytes."""
MAX_HEADER_BYTES = 10 << 20

_DIGEST_CONTEXT = b"kvferry/bundle/1"
_TOKEN_BYTES = 4
_FIELDS: dict[str, type] = {
    "model": str,
    "tenant": str,
    "weights": bytes,
    "tokenizer": bytes,
    "spec": bytes,
    "layout": int,
    "numerics": bytes,
    "block_size": int,
    "num_tokens": int,
    "bf16_bytes_per_token": int,
    "tokens": bytes,
    "records": bytes,
    "digest": bytes,
}
"""Names, order and types. `tokens` may be nil instead."""


@dataclass(frozen=True)
class RecordRow:
    """Where a block's record lies in the file, and what its bytes must be."""

    offset: int
    nbytes: int
    sha256: bytes


@dataclass(frozen=True, kw_only=True)
class BundleHeader:
    """What a bundle says it holds: row i is the record of block i of `chain`."""

    chain: Chain
    rows: tuple[RecordRow, ...]
    digest: bytes
    """SHA-256 over all other fields, and so over every record through its digest. Names the bundle."""

    @property
    def file_bytes(self) -> int:
        return self.rows[-1].offset + self.rows[-1].nbytes

    @property
    def bf16_bytes(self) -> int:
        """What the same tokens' K and V would take in 16 bits."""
        return self.chain.num_tokens * self.chain.bf16_bytes_per_token


def aligned(nbytes: int) -> int:
    return nbytes + -nbytes % ALIGNMENT


def row_offsets(chain: Chain) -> tuple[int, int]:
    """Where the head's table will begin and where the first record: known before any record is."""
    no_rows = [RecordRow(0, 0, bytes(DIGEST_BYTES))] * len(chain.keys)
    signed_bytes = len(encode_header(chain, no_rows))
    after_table = len(_pack({"digest": bytes(DIGEST_BYTES)})) - 1  # without the byte that opens a map
    return signed_bytes - after_table - len(no_rows) * ROW.size, head_bytes(signed_bytes)


def head_bytes(signed_bytes: int) -> int:
    """Preamble, header, signature and zeros; `signed_bytes` are preamble and header."""
    return aligned(signed_bytes + SIGNATURE_BYTES)


def encode_header(chain: Chain, rows: Sequence[RecordRow]) -> bytes:
    """Preamble and header: what a signature is made over."""
    fields = _fields(chain, rows)
    packed = _pack({**fields, "digest": _digest(fields)})
    return PREAMBLE.pack(MAGIC, FORMAT_VERSION, len(packed)) + packed


def read_preamble(preamble: bytes, file_bytes: int) -> int:
    """The header's length, checked against the limit and the file. Raises BundleDamaged."""
    if len(preamble) < PREAMBLE.size:
        raise BundleDamaged(f"the file has {file_bytes} bytes, too few for a bundle")
    magic, version, header_bytes = PREAMBLE.unpack(preamble)
    if magic != MAGIC:
        raise BundleDamaged("the file does not start like a bundle")
    if version != FORMAT_VERSION:
        raise BundleDamaged(f"the bundle has format version {version}; this kvferry reads version {FORMAT_VERSION}")
    if header_bytes > MAX_HEADER_BYTES:
        raise BundleDamaged(f"the bundle's header length {header_bytes} is over the limit of {MAX_HEADER_BYTES}")
    if head_bytes(PREAMBLE.size + header_bytes) > file_bytes:
        raise BundleDamaged("the file ends inside the bundle's header")
    return int(header_bytes)


def decode_header(signed: bytes, *, max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES) -> BundleHeader:
    """The header of `signed` (preamble and header). Raises BundleDamaged, and nothing else, for anything but the one
    encoding of a possible header whose digest and keys are right."""
    fields = _unpack(signed[PREAMBLE.size :])
    digest = fields.pop("digest")
    if digest != _digest(fields):
        raise BundleDamaged("the bundle's digest does not match its header")
    rows, keys = _read_rows(fields["records"], head_bytes(len(signed)), max_record_bytes)
    chain = _read_chain(fields, keys)
    if encode_header(chain, rows) != signed:
        raise BundleDamaged("the bundle's header is not in its one valid encoding")
    return BundleHeader(chain=chain, rows=rows, digest=digest)


def _unpack(packed: bytes) -> dict[str, Any]:
    try:
        fields = msgpack.unpackb(
            packed,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_TENANT_BYTES,
            max_bin_len=MAX_TOKENS * _TOKEN_BYTES,
            max_array_len=0,
            max_map_len=len(_FIELDS),
            max_ext_len=0,
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise BundleDamaged("the bundle's header is not valid msgpack, or over its limits") from error
    if type(fields) is not dict or list(fields) != list(_FIELDS):
        raise BundleDamaged("the bundle's header does not have its fields")
    for name, kind in _FIELDS.items():
        if type(fields[name]) is not kind and not (name == "tokens" and fields[name] is None):
            raise BundleDamaged(f"the bundle's header field {name} has a wrong type")
    return fields


def _read_rows(table: bytes, offset: int, max_record_bytes: int) -> tuple[tuple[RecordRow, ...], tuple[bytes, ...]]:
    num_rows, rest = divmod(len(table), ROW.size)
    if rest or not 1 <= num_rows <= MAX_BLOCKS:
        raise BundleDamaged(f"the bundle's table does not have 1 to {MAX_BLOCKS} rows of {ROW.size} bytes")
    rows: list[RecordRow] = []
    keys: list[bytes] = []
    for index, (key, start, nbytes, sha256) in enumerate(ROW.iter_unpack(table)):
        if not 1 <= nbytes <= max_record_bytes:
            raise BundleDamaged(f"record {index} has {nbytes} bytes; allowed: 1 to {max_record_bytes}")
        if start != offset:
            raise BundleDamaged(f"record {index} starts at byte {start}, not at {offset} where it must")
        rows.append(RecordRow(start, nbytes, sha256))
        keys.append(key)
        offset = aligned(start + nbytes)
    return tuple(rows), tuple(keys)


def _read_chain(fields: dict[str, Any], keys: tuple[bytes, ...]) -> Chain:
    try:
        namespace = Namespace(
            tenant=fields["tenant"],
            weights_digest=fields["weights"],
            tokenizer_digest=fields["tokenizer"],
            spec_digest=fields["spec"],
            layout_version=fields["layout"],
            numerics_class=fields["numerics"],
            block_size=fields["block_size"],
        )
    except ValueError as error:
        raise BundleDamaged("the bundle's namespace is impossible") from error
    num_tokens = len(keys) * namespace.block_size
    if fields["num_tokens"] != num_tokens or num_tokens > MAX_TOKENS:
        raise BundleDamaged(f"{len(keys)} blocks of {namespace.block_size} do not make a bundle of the tokens it names")
    raw = fields["tokens"]
    if raw is not None and len(raw) != num_tokens * _TOKEN_BYTES:
        raise BundleDamaged(f"the bundle does not have {num_tokens} token ids")
    chain = Chain(
        model_name=fields["model"],
        namespace=namespace,
        bf16_bytes_per_token=fields["bf16_bytes_per_token"],
        keys=keys,
        token_ids=None if raw is None else _tokens_from(raw),
    )
    problem = chain_problem(chain)
    if problem is not None:
        raise BundleDamaged(f"the bundle is impossible: {problem}")
    return chain


def _fields(chain: Chain, rows: Sequence[RecordRow]) -> dict[str, Any]:
    """All fields but the digest, in order."""
    namespace = chain.namespace
    return {
        "model": chain.model_name,
        "tenant": namespace.tenant,
        "weights": namespace.weights_digest,
        "tokenizer": namespace.tokenizer_digest,
        "spec": namespace.spec_digest,
        "layout": namespace.layout_version,
        "numerics": namespace.numerics_class,
        "block_size": namespace.block_size,
        "num_tokens": chain.num_tokens,
        "bf16_bytes_per_token": chain.bf16_bytes_per_token,
        "tokens": None if chain.token_ids is None else _tokens_to(chain.token_ids),
        "records": b"".join(
            ROW.pack(key, row.offset, row.nbytes, row.sha256) for key, row in zip(chain.keys, rows, strict=True)
        ),
    }


def _digest(fields: dict[str, Any]) -> bytes:
    return hashlib.sha256(_DIGEST_CONTEXT + _pack(fields)).digest()


def _pack(fields: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


def _tokens_to(token_ids: array[int]) -> bytes:
    """Token ids as little-endian u32."""
    if sys.byteorder == "big":
        token_ids = array("I", token_ids)
        token_ids.byteswap()
    return token_ids.tobytes()


def _tokens_from(raw: bytes) -> array[int]:
    token_ids = array("I", raw)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids
