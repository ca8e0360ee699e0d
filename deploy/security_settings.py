"""The `security` section: who may call what, and with which certificates. Paths, never secrets: settings travel."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from kvferry.deploy.store_settings import Section

CLUSTER_FOLDER = Path("~/.kvferry")
CLUSTER_TOKEN_FILE = CLUSTER_FOLDER / "cluster_token"
TOKENS_FILE = CLUSTER_FOLDER / "tokens.yaml"


class TlsSettings(Section):
    """PEM files. Each may hold a chain, `ca` several authorities."""

    cert: Path
    """Of every process, for what it serves and for what it calls."""
    key: Path
    ca: Path
    """Whose certificates the deployment's processes accept from each other: an authority of its own."""
    server_name: str | None = Field(None, min_length=1)
    """The name in `cert` that processes expect of each other; None: the address that they call."""
    gateway_cert: Path | None = None
    """What the gateway shows clients; None: `cert`."""
    gateway_key: Path | None = None
    require_client_cert: bool = False
    """Whether clients of the gateway need a certificate of `client_ca`."""
    client_ca: Path | None = None
    """None: `ca`."""

    @model_validator(mode="after")
    def _goes_together(self) -> TlsSettings:
        if (self.gateway_cert is None) != (self.gateway_key is None):
            raise ValueError("gateway_cert and gateway_key go together")
        if self.client_ca is not None and not self.require_client_cert:
            raise ValueError("client_ca is for require_client_cert: true")
        return self


class SecuritySettings(Section):
    insecure: bool = False
    """Bind any address without asking callers who they are."""
    cluster_token_file: Path | None = None
    """What processes of the deployment send each other; None with `cluster.bind: machine`: ~/.kvferry/cluster_token."""
    tokens_file: Path | None = None
    """Tokens of clients, by tenant; None with `cluster.bind: machine`: ~/.kvferry/tokens.yaml."""
    tls: TlsSettings | None = None

    @model_validator(mode="after")
    def _clients_are_no_peers(self) -> SecuritySettings:
        tls = self.tls
        if tls is not None and tls.require_client_cert and tls.client_ca is None and self.cluster_token_file is None:
            raise ValueError(
                "with require_client_cert and no client_ca, clients have certificates of tls.ca, which let them call "
                "workers and store nodes, too: set tls.client_ca, or a cluster_token_file"
            )
        return self

    def on_machines(self) -> SecuritySettings:
        """The same with the files that `kvferry up` puts on every machine, where no others are named."""
        given: dict[str, Path] = {}
        if not self.insecure and self.cluster_token_file is None:
            given["cluster_token_file"] = CLUSTER_TOKEN_FILE
        asks_clients = self.tls is not None and self.tls.require_client_cert
        if not self.insecure and not asks_clients and self.tokens_file is None:
            given["tokens_file"] = TOKENS_FILE
        return self.model_copy(update=given)
