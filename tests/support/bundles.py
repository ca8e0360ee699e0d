"""Small bundles for tests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kvferry.kvstore.bundle_chain import Chain, chain_of
from kvferry.kvstore.bundle_signature import Signer
from kvferry.kvstore.bundle_writer import BundleWriter
from kvferry.kvstore.codec import encode_record
from kvferry.kvstore.key import Namespace

BLOCK_SIZE = 32


def digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def namespace(**changes: Any) -> Namespace:
    fields: dict[str, Any] = {
        "tenant": "tenant",
        "weights_digest": digest("weights"),
        "tokenizer_digest": digest("tokenizer"),
        "spec_digest": digest("spec"),
        "layout_version": 1,
        "numerics_class": digest("numerics"),
        "block_size": BLOCK_SIZE,
    }
    return Namespace(**{**fields, **changes})


def small_chain(num_blocks: int = 3, *, first_token: int = 0, **changes: Any) -> Chain:
    """A chain with half a block of tokens too many, which it leaves out."""
    return chain_of(
        model_name="a model",
        namespace=namespace(**changes),
        bf16_bytes_per_token=100,
        token_ids=[first_token + i for i in range(num_blocks * BLOCK_SIZE + BLOCK_SIZE // 2)],
    )


def payload_of(chain: Chain, index: int, num_bytes: int = 70) -> bytes:
    """What a worker might pack for these tokens: the same for every tenant, different for every block."""
    assert chain.token_ids is not None
    seed = repr(chain.token_ids[: (index + 1) * BLOCK_SIZE].tolist()).encode()
    return hashlib.shake_128(seed).digest(num_bytes + index)


def record_of(chain: Chain, index: int, num_bytes: int = 70) -> bytes:
    return encode_record(
        key=chain.keys[index],
        namespace=chain.namespace.digest(),
        block_index=index,
        num_tokens=BLOCK_SIZE,
        payload=[payload_of(chain, index, num_bytes)],
    )


def new_signer() -> Signer:
    return Signer(Ed25519PrivateKey.generate())


def write_bundle(
    path: Path, chain: Chain, *, signer: Signer | None = None, tokens: bool = True, num_bytes: int = 70
) -> Path:
    with BundleWriter(path, chain if tokens else chain.without_tokens()) as writer:
        for index in range(len(chain.keys)):
            writer.append(record_of(chain, index, num_bytes))
        writer.finish(signer)
    return path


class Patched:
    """A file that is changed in place and put back, many times a second."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR)
        self.content = path.read_bytes()

    def flip(self, position: int, bit: int) -> None:
        os.pwrite(self._file, bytes([self.content[position] ^ 1 << bit]), position)

    def write(self, content: bytes) -> None:
        os.pwrite(self._file, content, 0)
        os.ftruncate(self._file, len(content))

    def restore(self) -> None:
        self.write(self.content)

    def close(self) -> None:
        os.close(self._file)
