"""Certificates and keys from PEM files, checked when a process starts: gRPC itself says nothing of what is wrong."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from kvferry.proto.peer_security import TlsIdentity


def read_identity(*, cert: Path, key: Path, ca: Path, server_name: str | None = None) -> TlsIdentity:
    """Raises ValueError, naming the file, for what is no PEM, over, or does not go together; OSError for what cannot be
    read."""
    read_authorities(ca)
    cert_pem, key_pem = read_key_pair(cert, key)
    return TlsIdentity(cert=cert_pem, key=key_pem, ca=ca.expanduser().read_bytes(), server_name=server_name)


def read_key_pair(cert: Path, key: Path) -> tuple[bytes, bytes]:
    """A certificate's PEM and its key's. Raises like `read_identity`."""
    cert_pem, key_pem = cert.expanduser().read_bytes(), key.expanduser().read_bytes()
    certificate = _certificates(cert, cert_pem)[0]
    try:
        private = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:  # TypeError: it has a password
        raise ValueError(f"{key} is no private key in PEM without a password") from error
    if private.public_key() != certificate.public_key():
        raise ValueError(f"{key} is not the key of the certificate in {cert}")
    return cert_pem, key_pem


def read_authorities(path: Path) -> bytes:
    """Raises like `read_identity`."""
    pem = path.expanduser().read_bytes()
    _certificates(path, pem)
    return pem


def _certificates(path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ValueError(f"{path} holds no certificate in PEM") from error
    over = min(certificate.not_valid_after_utc for certificate in found[:1])
    if over < datetime.datetime.now(datetime.UTC):
        raise ValueError(f"the certificate in {path} was valid until {over:%Y-%m-%d %H:%M} UTC: make a new one")
    return found


def first_name(pem: bytes) -> str | None:
    """A name or address that a certificate is for; None where it has none."""
    certificate = x509.load_pem_x509_certificates(pem)[0]
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    found = names.get_values_for_type(x509.DNSName) + [str(ip) for ip in names.get_values_for_type(x509.IPAddress)]
    return found[0].replace("*", "any") if found else None
