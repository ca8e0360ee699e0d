"""What a client shows a gateway, and whom it takes for one: a token, and certificates where the gateway speaks TLS."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import grpc
import grpc.aio

from kvferry.proto.bearer import BearerChannel, BlockingBearerChannel
from kvferry.proto.grpc_options import channel_options

TOKEN, TOKEN_FILE, CA, CERT, KEY = (f"KVFERRY_{name}" for name in ("TOKEN", "TOKEN_FILE", "CA", "CERT", "KEY"))
SYSTEM = "system"
"""In the place of a file: the authorities that gRPC trusts by itself, those of public certificates."""


@dataclass(frozen=True, kw_only=True)
class ClientAccess:
    """Its `repr` leaves secrets out. Raises ValueError for what does not go together."""

    token: str | None = field(default=None, repr=False)
    """Without TLS it crosses the network as it is."""
    tls: bool = False
    ca: bytes | None = None
    """PEM of the authorities of the gateway's certificate; None: `SYSTEM`."""
    cert: bytes | None = None
    """PEM of a certificate of the client's own, where the gateway asks for one."""
    key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.split()):
            raise ValueError("the token is none: it has to be one line of letters and digits")
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client's certificate and its key go together")
        if not self.tls and (self.ca is not None or self.cert is not None):
            raise ValueError("certificates are for TLS: set tls, and name the gateway's authority with ca")

    @classmethod
    def find(
        cls,
        *,
        token_file: Path | None = None,
        ca: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """What is given, else what the environment says: KVFERRY_TOKEN or KVFERRY_TOKEN_FILE, KVFERRY_CA, KVFERRY_CERT
        and KVFERRY_KEY. `ca`: a PEM file, or "system". Raises ValueError, and OSError for a file that cannot be read.
        """
        environ = os.environ if environ is None else environ
        token = None if token_file is not None else environ.get(TOKEN)
        named = token_file or (environ.get(TOKEN_FILE) if not token else None)
        if named:
            token = Path(named).expanduser().read_text().strip()
        ca = ca or environ.get(CA)
        cert, key = (
            Path(environ[name]).expanduser().read_bytes() if environ.get(name) else None for name in (CERT, KEY)
        )
        return cls(
            token=token or None,
            tls=bool(ca),
            ca=None if not ca or ca == SYSTEM else Path(ca).expanduser().read_bytes(),
            cert=cert,
            key=key,
        )

    def channel(self, address: str) -> grpc.Channel:
        if self.tls:
            channel = grpc.secure_channel(address, self._credentials(), options=channel_options())
        else:
            channel = grpc.insecure_channel(address, options=channel_options())
        return BlockingBearerChannel(channel, self.token) if self.token else channel

    def aio_channel(self, address: str) -> grpc.aio.Channel:
        """For the event loop that runs."""
        if self.tls:
            channel = grpc.aio.secure_channel(address, self._credentials(), options=channel_options())
        else:
            channel = grpc.aio.insecure_channel(address, options=channel_options())
        return BearerChannel(channel, self.token) if self.token else channel

    def _credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            root_certificates=self.ca, private_key=self.key, certificate_chain=self.cert
        )
