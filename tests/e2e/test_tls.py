"""TLS between the parts: who gets through to what, and that nobody who does not is left waiting."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import grpc.aio
import pytest
from support.certificates import Certificates
from support.wire_calls import LIMIT_S, OPEN, status_of

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.assembly import make_gateway
from kvferry.deploy.client import AsyncClient, Client, ClientAccess, Unauthenticated, Unavailable
from kvferry.deploy.client_resume import RetryPolicy
from kvferry.deploy.directory_server import DirectoryConfig, DirectoryServer
from kvferry.deploy.security import edge_security, gateway_security, peer_security
from kvferry.deploy.security_settings import SecuritySettings, TlsSettings
from kvferry.deploy.settings import GatewaySettings, Settings
from kvferry.deploy.token_files import make_missing_files
from kvferry.deploy.worker_server import ModelRuntime, WorkerServer
from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.server import KVStoreServer
from kvferry.prefill.config import PrefillConfig
from kvferry.proto.grpc_options import channel_options
from kvferry.proto.peer_security import PeerSecurity
from kvferry.proto.tls_files import read_authorities, read_identity, read_key_pair

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
ONE_TRY = RetryPolicy(max_attempts=1)


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Another authority."""
    return Certificates(tmp_path_factory.mktemp("foreign"))


async def health(security: PeerSecurity, address: str) -> grpc.StatusCode:
    async with security.channel(address, channel_options()) as channel:
        return (await status_of(channel, OPEN))[0]


async def health_over(credentials: grpc.ChannelCredentials, address: str) -> grpc.StatusCode:
    async with grpc.aio.secure_channel(address, credentials, options=channel_options()) as channel:
        return (await status_of(channel, OPEN))[0]


@pytest.fixture
async def internal(certificates: Certificates, runtime: Callable[..., ModelRuntime]) -> AsyncIterator[dict[str, str]]:
    """host:port of each kind of internal server, which speak TLS and have no token."""
    security = PeerSecurity(tls=certificates.node())
    async with AsyncExitStack() as stack:
        directory = DirectoryServer(DirectoryConfig(), security=security)
        store = KVStoreServer(MemoryBackend(capacity_bytes=2**20), NodeConfig(), security=security)
        prefill = WorkerServer(runtime(), config=PrefillConfig(), store_address=None, security=security)
        decode = WorkerServer(
            runtime(), config=DecodeConfig(kv_memory=32 * 2**20), store_address=None, security=security
        )
        addresses = {}
        for name, server in (("directory", directory), ("store", store), ("prefill", prefill), ("decode", decode)):
            started = await server.start()
            addresses[name] = started if isinstance(started, str) else store.address
            stack.push_async_callback(server.stop, 0.1)
        yield addresses


async def test_only_certificates_of_our_authority_open_an_internal_port(
    internal: dict[str, str], certificates: Certificates, foreign: Certificates
) -> None:
    ours, theirs = certificates.node(), foreign.node()
    over = certificates.issue("127.0.0.1", expires=datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC))
    over_cert, over_key = (path.read_bytes() for path in over)
    strangers = {
        "no certificate": grpc.ssl_channel_credentials(ours.ca),
        "a foreign one": grpc.ssl_channel_credentials(ours.ca, theirs.key, theirs.cert),
        "one that is over": grpc.ssl_channel_credentials(ours.ca, over_key, over_cert),
        "a server that we do not know": grpc.ssl_channel_credentials(theirs.ca, ours.key, ours.cert),
    }
    for name, address in internal.items():
        assert await health(PeerSecurity(tls=ours), address) is grpc.StatusCode.OK, name
        assert await health(PeerSecurity(), address) is UNAVAILABLE, f"plain text at {name}"
        for what, credentials in strangers.items():
            assert await health_over(credentials, address) is UNAVAILABLE, f"{what} at {name}"


async def test_the_server_s_name_is_checked(certificates: Certificates, foreign: Certificates) -> None:
    """By address, or by one name for all."""
    elsewhere = certificates.node("10.9.8.7", "kvferry.internal")
    server = DirectoryServer(DirectoryConfig(), security=PeerSecurity(tls=elsewhere))
    address = await server.start()
    assert await health(PeerSecurity(tls=elsewhere), address) is UNAVAILABLE
    for name, expected in (("kvferry.internal", grpc.StatusCode.OK), ("other.internal", UNAVAILABLE)):
        named = certificates.node("10.9.8.7", "kvferry.internal", server_name=name)
        assert await health(PeerSecurity(tls=named), address) is expected
    await server.stop(0.1)


async def test_tls_to_a_plain_port(certificates: Certificates) -> None:
    server = DirectoryServer(DirectoryConfig())
    address = await server.start()
    assert await health(PeerSecurity(tls=certificates.node()), address) is UNAVAILABLE
    await server.stop(0.1)


async def test_a_socket_that_says_nothing_holds_nobody_up(internal: dict[str, str], certificates: Certificates) -> None:
    """The handshakes of others go on."""
    host, port = internal["store"].split(":")
    idle = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
    assert await health(PeerSecurity(tls=certificates.node()), internal["store"]) is grpc.StatusCode.OK
    for _, writer in idle:
        writer.close()


# --- the gateway's port -----------------------------------------------------------------------------------------


def tls_settings(certificates: Certificates, **more: object) -> TlsSettings:
    cert, key = certificates.issue("127.0.0.1", "localhost")
    return TlsSettings(cert=cert, key=key, ca=certificates.ca, **more)  # type: ignore[arg-type]


async def serve(stack: AsyncExitStack, model: str, security: SecuritySettings) -> str:
    """A gateway without workers."""
    gateway = await make_gateway(Settings(model=model, gateway=GatewaySettings(port=0), security=security))
    port = await gateway.start()
    stack.push_async_callback(gateway.stop, 0.1)
    return f"127.0.0.1:{port}"


async def test_clients_need_no_certificate_unless_told(
    certificates: Certificates, foreign: Certificates, runtime: Callable[..., ModelRuntime], tmp_path: Path
) -> None:
    """And one for clients opens no internal port."""
    model = runtime().loaded.source.path
    make_missing_files(tmp_path)
    token = (tmp_path / "client_token").read_text().strip()
    clients = Certificates(tmp_path)
    cert, key = clients.issue("a-client")
    gateway_cert, gateway_key = foreign.issue("127.0.0.1", "gateway.example")
    trusting = ClientAccess(tls=True, ca=foreign.ca.read_bytes(), token=token)
    certified = ClientAccess(
        tls=True, ca=foreign.ca.read_bytes(), token=token, cert=cert.read_bytes(), key=key.read_bytes()
    )
    own = {"gateway_cert": gateway_cert, "gateway_key": gateway_key}
    asking = {**own, "require_client_cert": True, "client_ca": clients.ca}
    async with AsyncExitStack() as stack:
        open_to_all = SecuritySettings(tls=tls_settings(certificates, **own), tokens_file=tmp_path / "tokens.yaml")
        address = await serve(stack, model, open_to_all)
        async with AsyncClient(address, access=trusting) as client:
            assert (await client.count_tokens("Hello", timeout=LIMIT_S)).tokens > 0
        for wrong in (ClientAccess(), ClientAccess(tls=True, ca=certificates.ca.read_bytes())):
            async with AsyncClient(address, access=wrong, retry=ONE_TRY) as client:
                with pytest.raises(Unavailable):
                    await client.count_tokens("Hello", timeout=LIMIT_S)
        async with AsyncClient(address, access=ClientAccess(tls=True, ca=foreign.ca.read_bytes())) as client:
            with pytest.raises(Unauthenticated, match="asks for a token"):
                await client.models(timeout=LIMIT_S)
        assert await health(gateway_security(open_to_all), address) is grpc.StatusCode.OK

        closed = SecuritySettings(tls=tls_settings(certificates, **asking), tokens_file=tmp_path / "tokens.yaml")
        address = await serve(stack, model, closed)
        async with AsyncClient(address, access=certified) as client:
            assert (await client.count_tokens("Hello", timeout=LIMIT_S)).tokens > 0
        async with AsyncClient(address, access=trusting, retry=ONE_TRY) as client:
            with pytest.raises(Unavailable):
                await client.count_tokens("Hello", timeout=LIMIT_S)
        assert await health(gateway_security(closed), address) is grpc.StatusCode.OK

        store = KVStoreServer(
            MemoryBackend(capacity_bytes=1000), NodeConfig(), security=PeerSecurity(tls=certificates.node())
        )
        await store.start()
        stack.push_async_callback(store.stop, 0.1)
        a_client = grpc.ssl_channel_credentials(certificates.ca.read_bytes(), key.read_bytes(), cert.read_bytes())
        assert await health_over(a_client, store.address) is UNAVAILABLE


async def test_the_blocking_client(
    certificates: Certificates, runtime: Callable[..., ModelRuntime], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of it from the environment."""
    make_missing_files(tmp_path)
    security = SecuritySettings(tls=tls_settings(certificates), tokens_file=tmp_path / "tokens.yaml")
    async with AsyncExitStack() as stack:
        address = await serve(stack, runtime().loaded.source.path, security)
        monkeypatch.setenv("KVFERRY_TOKEN_FILE", str(tmp_path / "client_token"))
        monkeypatch.setenv("KVFERRY_CA", str(certificates.ca))
        with Client(address) as client:
            assert (await asyncio.to_thread(client.count_tokens, "Hello", timeout=LIMIT_S)).tokens > 0


# --- files ------------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_file_is_said_at_the_start(
    certificates: Certificates, foreign: Certificates, tmp_path: Path
) -> None:
    cert, key = certificates.issue("127.0.0.1")
    other = foreign.issue("127.0.0.1")[1]
    over = certificates.issue("127.0.0.1", expires=datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC))
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    assert read_key_pair(cert, key) == (cert.read_bytes(), key.read_bytes())
    for arguments, said in (
        ({"cert": cert, "key": other, "ca": certificates.ca}, "is not the key of the certificate"),
        ({"cert": nothing, "key": key, "ca": certificates.ca}, "holds no certificate"),
        ({"cert": cert, "key": nothing, "ca": certificates.ca}, "is no private key"),
        ({"cert": cert, "key": key, "ca": nothing}, "holds no certificate"),
        ({"cert": over[0], "key": over[1], "ca": certificates.ca}, "was valid until 2024-01-01"),
    ):
        with pytest.raises(ValueError, match=said):
            read_identity(**arguments)
    with pytest.raises(OSError, match=r"missing\.pem"):
        read_authorities(tmp_path / "missing.pem")
    missing = SecuritySettings(cluster_token_file=tmp_path / "missing")
    with pytest.raises(OSError, match="kvferry token setup"):
        peer_security(missing)
    assert edge_security(missing).is_open


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gateway_cert": "x"}, "go together"),
        ({"client_ca": "x"}, "require_client_cert"),
        ({"require_client_cert": True}, "set tls.client_ca, or a cluster_token_file"),
    ],
)
def test_keys_that_do_not_go_together(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings.load(None, security={"tls": {"cert": "a", "key": "b", "ca": "c", **given}})
