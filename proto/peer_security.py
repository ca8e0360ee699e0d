"""How the processes of one deployment know each other: a shared token, certificates of one authority, or both.

It makes every channel between them and opens every port of theirs, so that no place can forget it.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

import grpc
import grpc.aio

from kvferry.proto.bearer import BearerChannel, BlockingBearerChannel
from kvferry.proto.grpc_options import Options
from kvferry.proto.token_guard import TokenGuard


class OpenPortRefused(ValueError):
    """A port would let everybody in who reaches it; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class TlsIdentity:
    """A process's certificate, and whose certificates it accepts. PEM."""

    cert: bytes
    """With the chain below the authority, if there is one."""
    key: bytes = field(repr=False)
    ca: bytes
    """Certificates of the authorities."""
    server_name: str | None = None
    """The name that servers' certificates are for; None: the address that is called."""


@dataclass(frozen=True, kw_only=True)
class PeerSecurity:
    """Holds secrets, which its `repr` leaves out. Without tokens and TLS, ports are bound to loopback only."""

    tokens: tuple[str, ...] = field(default=(), repr=False)
    """The first one is sent; all of them are accepted, so that they can be changed one process after the other."""
    tls: TlsIdentity | None = None
    """TLS on every connection, and both ends show a certificate."""
    insecure: bool = False
    """Somebody has said that open ports are meant."""

    @property
    def is_open(self) -> bool:
        """Whether nobody is asked who he is."""
        return not self.tokens and self.tls is None

    def channel(self, address: str, options: Options) -> grpc.aio.Channel:
        """To a process of the deployment. Nothing is sent before the first call."""
        if self.tls is None:
            channel = grpc.aio.insecure_channel(address, options=options)
        else:
            channel = grpc.aio.secure_channel(address, self._credentials(), options=self._with_name(options))
        return BearerChannel(channel, self.tokens[0]) if self.tokens else channel

    def blocking_channel(self, address: str, options: Options) -> grpc.Channel:
        """The same for threads."""
        if self.tls is None:
            channel = grpc.insecure_channel(address, options=options)
        else:
            channel = grpc.secure_channel(address, self._credentials(), options=self._with_name(options))
        return BlockingBearerChannel(channel, self.tokens[0]) if self.tokens else channel

    def guards(self) -> tuple[TokenGuard, ...]:
        """Interceptors that go before all others of a server."""
        return (TokenGuard(self.tokens),) if self.tokens else ()

    def require_asking(self, address: str) -> None:
        """Raises OpenPortRefused where host:port would let everybody in who reaches it."""
        host = address.rpartition(":")[0]
        if self.is_open and not self.insecure and not is_loopback(host):
            raise OpenPortRefused(
                f"{address} may be reached by others, and nothing would ask who they are: set "
                "security.cluster_token_file (`kvferry token setup` makes one) or security.tls on every machine, or "
                "bind 127.0.0.1, or set security.insecure to true in a network where you trust everybody"
            )

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Binds host:port and returns the port. Raises OpenPortRefused, and OSError when it is taken."""
        self.require_asking(address)
        credentials = None if self.tls is None else self._server_credentials(self.tls)
        return add_port(server, address, credentials)

    def _credentials(self) -> grpc.ChannelCredentials:
        assert self.tls is not None
        return grpc.ssl_channel_credentials(
            root_certificates=self.tls.ca, private_key=self.tls.key, certificate_chain=self.tls.cert
        )

    def _with_name(self, options: Options) -> Options:
        name = None if self.tls is None else self.tls.server_name
        return [*options, ("grpc.ssl_target_name_override", name)] if name else options

    @staticmethod
    def _server_credentials(tls: TlsIdentity) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials([(tls.key, tls.cert)], root_certificates=tls.ca, require_client_auth=True)


def add_port(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Binds host:port, any free port for 0, and returns it. Raises OSError when it is taken."""
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: is the port taken?") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound to `host`. A name other than localhost may be anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
