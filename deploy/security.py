"""From the `security` section to what ports and channels need. Reads the files that it names."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from kvferry.deploy.client_tokens import read_client_tokens
from kvferry.deploy.edge_security import EdgeSecurity, EdgeTls
from kvferry.deploy.security_settings import SecuritySettings
from kvferry.deploy.settings import Settings
from kvferry.proto.peer_security import PeerSecurity
from kvferry.proto.tls_files import first_name, read_authorities, read_identity, read_key_pair
from kvferry.proto.token_file import read_tokens


def peer_security(security: SecuritySettings) -> PeerSecurity:
    """Among the deployment's own processes. Raises ValueError for what a file holds, OSError for one that cannot be
    read; both say what to do."""
    tls = security.tls
    path = security.cluster_token_file
    try:
        tokens = () if path is None else read_tokens(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no cluster token at {path} (security.cluster_token_file): `kvferry token setup` makes one; "
            "every machine needs the same"
        ) from None
    return PeerSecurity(
        tokens=tokens,
        tls=None if tls is None else read_identity(cert=tls.cert, key=tls.key, ca=tls.ca, server_name=tls.server_name),
        insecure=security.insecure,
    )


def edge_security(security: SecuritySettings) -> EdgeSecurity:
    """At the gateway's port. Raises as `peer_security`. The file of tokens is read by the gateway, again and again."""
    tls = security.tls
    if tls is None:
        return EdgeSecurity(tokens_file=security.tokens_file, insecure=security.insecure)
    cert, key = read_key_pair(tls.gateway_cert or tls.cert, tls.gateway_key or tls.key)
    client_ca = None
    if tls.require_client_cert:  # the deployment's own processes are let in, too: they ask for health
        client_ca = b"\n".join(map(read_authorities, {tls.ca, tls.client_ca or tls.ca}))
    return EdgeSecurity(
        tokens_file=security.tokens_file,
        tls=EdgeTls(cert=cert, key=key, client_ca=client_ca),
        insecure=security.insecure,
    )


def gateway_security(security: SecuritySettings) -> PeerSecurity:
    """How the deployment's own processes call a gateway: one with a certificate of its own is known by just that.

    Raises as `peer_security`."""
    peers, tls = peer_security(security), security.tls
    if peers.tls is None or tls is None or tls.gateway_cert is None:
        return peers
    pem = read_authorities(tls.gateway_cert)
    return replace(peers, tls=replace(peers.tls, ca=pem, server_name=first_name(pem)))


class Credentials(NamedTuple):
    """How an operator's command asks the processes of a deployment."""

    peers: PeerSecurity = PeerSecurity()
    gateways: PeerSecurity = PeerSecurity()


def operator_credentials(security: SecuritySettings) -> Credentials:
    """Raises as `peer_security`."""
    return Credentials(peer_security(security), gateway_security(security))


def require_files(settings: Settings) -> None:
    """Reads what the processes of a cluster will read, so that a mistake shows before they start. Raises as
    `peer_security`."""
    peer_security(settings.security)
    edge = edge_security(settings.security)
    if edge.tokens_file is not None and settings.gateway.count:
        try:
            read_client_tokens(edge.tokens_file)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there is no file of client tokens at {edge.tokens_file} (security.tokens_file): "
                "`kvferry token setup` makes one"
            ) from None


def require_asking(settings: Settings) -> None:
    """Of a deployment on one machine, before models are loaded: raises OpenPortRefused for a port that would be open,
    and as `peer_security`."""
    peers = peer_security(settings.security)
    edge_security(settings.security).require_asking(f"{settings.gateway.host}:{settings.gateway.port}")
    store, prefill, decode = settings.store, settings.prefill, settings.decode
    if not store.nodes:
        peers.require_asking(f"{store.host}:{store.port}")
    if prefill.count:
        peers.require_asking(f"{prefill.host}:{prefill.port}")
    peers.require_asking(f"{decode.host}:{decode.port}")
