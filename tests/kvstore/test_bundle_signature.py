"""Who signed what, and whom one trusts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from support.bundles import new_signer, small_chain, write_bundle

from kvferry.kvstore.bundle_errors import BundleDamaged, BundleRefused
from kvferry.kvstore.bundle_reader import BundleReader
from kvferry.kvstore.bundle_signature import (
    _CONTEXT,
    _SMALL_ORDER_KEYS,
    UNSIGNED,
    Signer,
    load_trusted,
    parse_public_key,
    require_trusted,
    signer_of,
    write_key_pair,
)
from kvferry.kvstore.errors import InvalidRequest

CHAIN = small_chain()


def test_keys_written_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "key"
    public_key = write_key_pair(path)
    assert path.stat().st_mode & 0o777 == 0o600
    signer = Signer.load(path)
    assert signer.public_key == public_key
    assert load_trusted(tmp_path / "key.pub") == {public_key: "key"}
    with pytest.raises(FileExistsError):
        write_key_pair(path)
    path.unlink()
    with pytest.raises(FileExistsError):
        write_key_pair(path)
    assert not path.exists()


def test_a_signature_is_of_one_head_by_one_key(tmp_path: Path) -> None:
    alice, mallory = new_signer(), new_signer()
    signed = b"a head"
    assert signer_of(signed, alice.sign(signed)) == alice.public_key
    assert signer_of(signed, UNSIGNED) is None
    with pytest.raises(BundleDamaged):
        signer_of(b"another head", alice.sign(signed))
    with pytest.raises(BundleDamaged):
        signer_of(signed, alice.public_key + mallory.sign(signed)[32:])
    with pytest.raises(BundleDamaged):  # a signature for something else than bundles
        signer_of(signed, alice.public_key + alice._key.sign(signed))


def test_a_signature_moved_to_another_bundle_is_refused(tmp_path: Path) -> None:
    alice = new_signer()
    signed = write_bundle(tmp_path / "a", CHAIN, signer=alice).read_bytes()
    other = bytearray(write_bundle(tmp_path / "b", small_chain(first_token=9)).read_bytes())
    at = signed.index(alice.public_key)
    other[at : at + 96] = signed[at : at + 96]
    (tmp_path / "b").write_bytes(other)
    with pytest.raises(BundleDamaged, match="signature"):
        BundleReader(tmp_path / "b")


@pytest.mark.parametrize("public_key", sorted(_SMALL_ORDER_KEYS), ids=lambda key: key.hex()[:4] + key.hex()[-2:])
def test_keys_with_which_anybody_can_sign_are_refused(public_key: bytes, tmp_path: Path) -> None:
    """The forger's signature is the neutral point and 0. The library takes it for one message in the point's order."""
    forged = b"\x01" + bytes(63)
    accepted = 0
    for number in range(100):
        signed = b"head %d" % number
        try:
            Ed25519PublicKey.from_public_bytes(public_key).verify(forged, _CONTEXT + signed)
            accepted += 1
        except InvalidSignature:
            pass
        with pytest.raises(BundleDamaged, match="anybody"):
            signer_of(signed, public_key + forged)
    if public_key[0] not in (0xED, 0xEE):  # the library refuses these two
        assert accepted
    for sign in (0, 0x80):
        with pytest.raises(InvalidRequest, match="anybody"):
            parse_public_key((public_key[:-1] + bytes([public_key[-1] | sign])).hex())
    (tmp_path / "trust").write_text(f"ed25519 {public_key.hex()} mallory\n")
    with pytest.raises(InvalidRequest, match="anybody"):
        load_trusted(tmp_path / "trust")


def test_trust() -> None:
    alice, bob = new_signer().public_key, new_signer().public_key
    require_trusted(alice, {alice: "Alice"})
    require_trusted(None, {}, accept_unsigned=True)
    with pytest.raises(BundleRefused, match="--insecure-accept-unsigned"):
        require_trusted(None, {alice: "Alice"})
    for accept_unsigned in (False, True):  # accepting unsigned ones is not trusting a stranger
        with pytest.raises(BundleRefused, match=f"--trust-this-signer {bob.hex()}"):
            require_trusted(bob, {alice: "Alice"}, accept_unsigned=accept_unsigned)


def test_trust_files(tmp_path: Path) -> None:
    alice, bob = new_signer().public_key, new_signer().public_key
    path = tmp_path / "trust"
    path.write_text(f"# people\n\ned25519 {alice.hex()} Alice of A\n  ed25519 {bob.hex()}\n")
    assert load_trusted(path) == {alice: "Alice of A", bob: ""}
    for line in ("rsa 00 x", f"ed25519 {alice.hex()}00", f"ed25519 {alice.hex()[:-2]} short", "ed25519", "\x00"):
        path.write_text(f"# ok\n{line}\n")
        with pytest.raises(InvalidRequest, match="line 2: write 'ed25519"):
            load_trusted(path)
    path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(InvalidRequest, match="no trust file"):
        load_trusted(path)
    for text in ("", "zz" * 32, "ab" * 31):
        with pytest.raises(InvalidRequest, match="64 hex digits"):
            parse_public_key(text)


def test_key_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_key_pair(path)
    path.chmod(0o640)
    with pytest.raises(InvalidRequest, match="chmod 600"):
        Signer.load(path)
    other = generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    locked = serialization.load_pem_private_key(path.read_bytes(), None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"pw")
    )
    for content in (b"", b"no key", os.urandom(500), path.read_bytes()[:60], other, locked):
        bad = tmp_path / "bad"
        bad.write_bytes(content)
        bad.chmod(0o600)
        with pytest.raises(InvalidRequest, match="kvferry prefix keygen"):
            Signer.load(bad)
