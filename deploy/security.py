"""From the `security` section to what ports and channels need. Reads the files that it names."""

from __future__ import annotations

from kvferry.deploy.edge_security import EdgeSecurity, EdgeTls
from kvferry.deploy.security_settings import SecuritySettings
from kvferry.proto.peer_security import PeerSecurity
from kvferry.proto.tls_files import read_authorities, read_identity, read_key_pair
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
    client_ca = read_authorities(tls.client_ca or tls.ca) if tls.require_client_cert else None
    return EdgeSecurity(
        tokens_file=security.tokens_file,
        tls=EdgeTls(cert=cert, key=key, client_ca=client_ca),
        insecure=security.insecure,
    )
