"""Block keys: the content address of a block, chained over the tokens before it.

Every field is length-prefixed before it is hashed, so that no two different field lists give the
same bytes. Keys are whole SHA-256 digests, never truncated: anyone may choose token ids, so a
shorter or weaker hash would let one prompt answer for another.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

KEY_BYTES = 32
DIGEST_BYTES = 32
MAX_TENANT_BYTES = 1024

_NAMESPACE_MAGIC = b"kvferry/namespace/1"
_BLOCK_MAGIC = b"kvferry/block-key/1"
_ROOT = b"root"  # the parent of block 0; its length alone tells it from a 32-byte key
_U64 = struct.Struct("<Q")


def _prefixed(field: bytes) -> bytes:
    return _U64.pack(len(field)) + field


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """Everything but the tokens that decides the bytes of a block.

    Two namespaces that differ in any field share no block. Digests are 32 bytes each.
    Raises ValueError for a field of the wrong size or range.
    """

    tenant: str
    weights_digest: bytes
    tokenizer_digest: bytes
    spec_digest: bytes
    layout_version: int
    numerics_class: bytes
    block_size: int  # tokens a block

    def __post_init__(self) -> None:
        if not isinstance(self.tenant, str) or not self.tenant:
            raise ValueError("tenant must be a non-empty string")
        if len(self.tenant.encode()) > MAX_TENANT_BYTES:
            raise ValueError(f"tenant must be at most {MAX_TENANT_BYTES} bytes of UTF-8")
        for name in ("weights_digest", "tokenizer_digest", "spec_digest", "numerics_class"):
            value = getattr(self, name)
            if not isinstance(value, bytes) or len(value) != DIGEST_BYTES:
                raise ValueError(f"{name} must be {DIGEST_BYTES} bytes")
        for name, low in (("layout_version", 0), ("block_size", 1)):
            number = getattr(self, name)
            if type(number) is not int or not low <= number < 1 << 32:
                raise ValueError(f"{name} must be an integer from {low} to 2**32 - 1")

    def digest(self) -> bytes:
        """SHA-256 over the length-prefixed fields, in the order they are declared."""
        fields = (
            _NAMESPACE_MAGIC,
            self.tenant.encode(),
            self.weights_digest,
            self.tokenizer_digest,
            self.spec_digest,
            _U64.pack(self.layout_version),
            self.numerics_class,
            _U64.pack(self.block_size),
        )
        return hashlib.sha256(b"".join(map(_prefixed, fields))).digest()


def _token_bytes(token_ids: Sequence[int]) -> memoryview:
    """Token ids as little-endian u32."""
    try:
        tokens = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise ValueError("token ids must be integers from 0 to 2**32 - 1") from error
    if sys.byteorder == "big":
        tokens.byteswap()
    return memoryview(tokens).cast("B")


def block_keys(namespace: Namespace, token_ids: Sequence[int]) -> list[bytes]:
    """One 32-byte key per complete block of `token_ids`, in order.

    A key names all tokens up to the end of its block; the last, incomplete block has none.
    Raises ValueError for token ids outside 0..2**32-1.
    """
    block_size = namespace.block_size
    block_bytes = 4 * block_size
    tokens = _token_bytes(token_ids)
    start = hashlib.sha256(_prefixed(_BLOCK_MAGIC) + _prefixed(namespace.digest()))
    index_prefix, tokens_prefix = _U64.pack(_U64.size), _U64.pack(block_bytes)
    keys: list[bytes] = []
    parent = _ROOT
    for index in range(len(token_ids) // block_size):
        block = start.copy()
        block.update(_prefixed(parent) + index_prefix + _U64.pack(index) + tokens_prefix)
        block.update(tokens[index * block_bytes : (index + 1) * block_bytes])
        parent = block.digest()
        keys.append(parent)
    return keys
