"""Certificates of authorities that exist for a test."""

from __future__ import annotations

import datetime
from pathlib import Path

import trustme

from kvferry.proto.peer_security import TlsIdentity
from kvferry.proto.tls_files import read_identity


class Certificates:
    """An authority, and what it issues, as PEM files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, *names: str, expires: datetime.datetime | None = None) -> tuple[Path, Path]:
        """A certificate for these names, and its key."""
        issued = self._authority.issue_cert(*names, not_after=expires)
        stem = "-".join(names).replace(":", "_") + ("" if expires is None else "-over")
        cert, key = self._folder / f"{stem}.pem", self._folder / f"{stem}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return cert, key

    def node(self, *names: str, server_name: str | None = None) -> TlsIdentity:
        """What a process of a deployment has; by default for loopback."""
        cert, key = self.issue(*(names or ("127.0.0.1", "localhost")))
        return read_identity(cert=cert, key=key, ca=self.ca, server_name=server_name)
