"""Who vouches for a bundle: Ed25519 signatures, key files and the file of trusted signers.

Checksums find damage, not lies: whoever can write a bundle can give wrong K and V right checksums. A signature binds a
bundle to somebody whom the operator decided to trust with the contents of the cache.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from kvferry.kvstore.bundle_errors import BundleDamaged, BundleRefused
from kvferry.kvstore.bundle_format import SIGNATURE_BYTES
from kvferry.kvstore.errors import InvalidRequest

PUBLIC_KEY_BYTES = 32
UNSIGNED = bytes(SIGNATURE_BYTES)

# Points of order 1, 2, 4 and 8, without the sign bit, the encodings past the field's size included. For such a "key"
# anybody can write signatures that verify for one message in eight or more, and libraries accept them: an unsigned
# bundle with one bit flipped in the zeros of its signature was once read as signed by the key of zeros.
_SMALL_ORDER_KEYS = frozenset(
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)
_CONTEXT = b"kvferry/bundle-signature/1\0"
_MAX_FILE_BYTES = 1 << 20
_LINE = re.compile(r"ed25519 ([0-9a-f]{64})(?:\s+(.*))?")


class Signer:
    """A private key in memory."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key: bytes = key.public_key().public_bytes_raw()

    @classmethod
    def load(cls, path: Path) -> Signer:
        """From a PEM file that only its owner can read. Raises InvalidRequest, or OSError."""
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise InvalidRequest(f"{path} can be read by others: chmod 600 {path}")
            pem = file.read(_MAX_FILE_BYTES)
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise InvalidRequest(
                f"{path} is no unencrypted PEM private key: make one with kvferry prefix keygen"
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidRequest(f"{path} is no Ed25519 key: make one with kvferry prefix keygen")
        return cls(key)

    def sign(self, signed: bytes) -> bytes:
        """Public key and signature over preamble and header, 96 bytes."""
        return self.public_key + self._key.sign(_CONTEXT + signed)


def signer_of(signed: bytes, signature: bytes) -> bytes | None:
    """The public key whose signature over preamble and header this is, or None for an unsigned bundle.

    Raises BundleDamaged for a signature that does not verify.
    """
    if signature == UNSIGNED:
        return None
    public_key = signature[:PUBLIC_KEY_BYTES]
    if _has_small_order(public_key):
        raise BundleDamaged("the bundle's signature is of a key with which anybody can sign")
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature[PUBLIC_KEY_BYTES:], _CONTEXT + signed)
    except (InvalidSignature, ValueError) as error:
        raise BundleDamaged("the bundle's signature does not belong to its header") from error
    return public_key


def require_trusted(signer: bytes | None, trusted: dict[bytes, str], *, accept_unsigned: bool = False) -> None:
    """Raises BundleRefused unless the signer is trusted, or there is none and the operator insists."""
    if signer is None:
        if not accept_unsigned:
            raise BundleRefused(
                "the bundle is unsigned: whoever wrote the file decides what the model sees. Ask for a signed one; "
                "--insecure-accept-unsigned imports it all the same"
            )
    elif signer not in trusted:
        raise BundleRefused(
            f"the bundle's signer {signer.hex()} is not trusted here. If you know whose key this is, add the line "
            f"'ed25519 {signer.hex()} NAME' to the trust file, or trust it once with --trust-this-signer {signer.hex()}"
        )


def write_key_pair(path: Path) -> bytes:
    """A new private key in `path` (mode 0600) and its line for trust files in `path`.pub. Returns the public key.

    Raises FileExistsError rather than replace either file.
    """
    key = Ed25519PrivateKey.generate()
    public_key = key.public_key().public_bytes_raw()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public_path = path.with_name(path.name + ".pub")
    if public_path.exists():
        raise FileExistsError(f"{public_path} is there already")
    for target, content, mode in ((path, pem, 0o600), (public_path, _line(public_key, path.name).encode(), 0o644)):
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return public_key


def load_trusted(path: Path) -> dict[bytes, str]:
    """Public key to name. Lines are `ed25519 HEX NAME`; empty ones and those after # are skipped.

    Raises InvalidRequest naming a line that is none of these, or OSError.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise InvalidRequest(f"{path} has over {_MAX_FILE_BYTES} bytes: that is no trust file")
    trusted: dict[bytes, str] = {}
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise InvalidRequest(f"{path}, line {number}: write 'ed25519 <64 hex digits> <name>'")
        trusted[parse_public_key(match.group(1))] = match.group(2) or ""
    return trusted


def parse_public_key(text: str) -> bytes:
    """32 bytes from 64 hex digits. Raises InvalidRequest."""
    if re.fullmatch(r"[0-9a-fA-F]{64}", text) is None:
        raise InvalidRequest("a signer is named by the 64 hex digits of its public key")
    public_key = bytes.fromhex(text)
    if _has_small_order(public_key):
        raise InvalidRequest("this is no public key that can be trusted: anybody can sign with it")
    return public_key


def _has_small_order(public_key: bytes) -> bool:
    return public_key[:-1] + bytes([public_key[-1] & 0x7F]) in _SMALL_ORDER_KEYS


def _line(public_key: bytes, name: str) -> str:
    return f"ed25519 {public_key.hex()} {name}\n"
