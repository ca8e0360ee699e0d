"""The format is pinned: the example of docs/bundle.md byte for byte, and a reader written from that page alone."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from support.bundles import payload_of, record_of, small_chain, write_bundle

from kvferry.kvstore.bundle_signature import Signer

CHAIN = small_chain(2)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "bundle.md"


def example(tmp_path: Path) -> bytes:
    signer = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    return write_bundle(tmp_path / "x", CHAIN, signer=signer).read_bytes()


def test_the_example(tmp_path: Path) -> None:
    content = example(tmp_path)
    assert content[:8] == b"kvbundle"
    assert struct.unpack_from("<II", content, 8) == (1, 728)
    assert content[840:896] == bytes(56)
    assert content[896 : 896 + 262] == record_of(CHAIN, 0)
    assert content[1216:] == record_of(CHAIN, 1)
    assert len(content) == 1479
    assert hashlib.sha256(content).hexdigest() == "57a147bae013d0d4611e36c8a414cceabd3aea4ac48ca65cc2ebc7c5151e993e"
    page = DOCS.read_text()
    for number in ("728", "744", "840", "896", "1,158", "1,216", "1,479", content[712:744].hex()[:16]):
        assert number in page, number


def test_a_reader_written_from_the_page(tmp_path: Path) -> None:
    content = example(tmp_path)
    magic, version, length = struct.unpack_from("<8sII", content)
    assert (magic, version) == (b"kvbundle", 1)
    signed = content[: 16 + length]
    header = msgpack.unpackb(signed[16:])
    digest = header.pop("digest")
    assert hashlib.sha256(b"kvferry/bundle/1" + msgpack.packb(header)).digest() == digest
    public_key, signature = content[16 + length :][:32], content[16 + length + 32 :][:64]
    Ed25519PublicKey.from_public_bytes(public_key).verify(signature, b"kvferry/bundle-signature/1\0" + signed)

    def prefixed(*fields: bytes) -> bytes:
        return b"".join(struct.pack("<Q", len(field)) + field for field in fields)

    namespace = hashlib.sha256(
        prefixed(
            b"kvferry/namespace/1",
            header["tenant"].encode(),
            header["weights"],
            header["tokenizer"],
            header["spec"],
            struct.pack("<Q", header["layout"]),
            header["numerics"],
            struct.pack("<Q", header["block_size"]),
        )
    ).digest()
    parent, size = b"root", 4 * header["block_size"]
    for index, (key, offset, nbytes, sha256) in enumerate(struct.iter_unpack("<32sQQ32s", header["records"])):
        tokens = header["tokens"][index * size : (index + 1) * size]
        parent = hashlib.sha256(
            prefixed(b"kvferry/block-key/1", namespace, parent, struct.pack("<Q", index), tokens)
        ).digest()
        assert key == parent == CHAIN.keys[index]
        record = content[offset : offset + nbytes]
        assert hashlib.sha256(record).digest() == sha256
        assert record.endswith(payload_of(CHAIN, index))
    assert index + 1 == len(CHAIN.keys)
