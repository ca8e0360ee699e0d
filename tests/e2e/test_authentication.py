"""Who may call what: every method of every server of a deployment, found through the descriptors of the protos."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest
from support.certificates import Certificates
from support.wire_calls import HEALTH, OPEN, all_services, status_of

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.assembly import make_gateway
from kvferry.deploy.directory_client import DirectoryMembership, Registration, list_members
from kvferry.deploy.directory_server import DirectoryConfig, DirectoryServer
from kvferry.deploy.security_settings import SecuritySettings
from kvferry.deploy.settings import GatewaySettings, Settings
from kvferry.deploy.worker_server import ModelRuntime, WorkerServer
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.config import ClientConfig, NodeConfig
from kvferry.kvstore.errors import StoreUnavailable
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.server import KVStoreServer
from kvferry.prefill.config import PrefillConfig
from kvferry.proto.bearer import bearer_metadata
from kvferry.proto.peer_security import OpenPortRefused, PeerSecurity, is_loopback
from kvferry.proto.token_file import new_token, read_tokens, write_secret
from kvferry.proto.token_guard import TokenGuard

ROOT = Path(__file__).resolve().parents[2]
TOKEN, NEXT_TOKEN = new_token(), new_token()
RIGHT = bearer_metadata(TOKEN)
WRONG = [
    (),
    bearer_metadata(new_token()),
    bearer_metadata(TOKEN[:-1]),
    bearer_metadata(TOKEN + "x"),
    (("authorization", f"Basic {TOKEN}"),),
    (("authorization", TOKEN),),
    (("authorization", "Bearer "),),
    (*RIGHT, *RIGHT),
    (*bearer_metadata(new_token()), *RIGHT),
]
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

SERVED = {
    "directory": {"kvferry.directory.v1.Directory"},
    "store": {"kvferry.kvstore.v1.KVStore"},
    "prefill": {"kvferry.worker.v1.Worker", "kvferry.worker.v1.Prefill"},
    "decode": {"kvferry.worker.v1.Worker", "kvferry.worker.v1.Decode"},
    "both": {"kvferry.worker.v1.Worker", "kvferry.worker.v1.Decode", "kvferry.worker.v1.Prefill"},
}
"""What each internal server offers."""
EDGE = {"kvferry.inference.v1.Inference", "kvferry.gateway.v1.Gateway"}


@dataclass
class Servers:
    """host:port by kind of server."""

    addresses: dict[str, str]
    gateway: str


async def _start(
    stack: AsyncExitStack, runtime: ModelRuntime, security: PeerSecurity, settings: SecuritySettings
) -> Servers:
    directory = DirectoryServer(DirectoryConfig(), security=security)
    addresses = {"directory": await directory.start()}
    stack.push_async_callback(directory.stop, 0.1)
    store = KVStoreServer(MemoryBackend(capacity_bytes=2**20), NodeConfig(), security=security)
    await store.start()
    addresses["store"] = store.address
    stack.push_async_callback(store.stop, 0.1)
    for kind, config in (
        ("prefill", PrefillConfig()),
        ("decode", DecodeConfig(kv_memory=32 * 2**20)),
        ("both", DecodeConfig(kv_memory=32 * 2**20)),
    ):
        worker = WorkerServer(
            runtime,
            config=config,
            store_address=store.address,
            own_prefill=PrefillConfig() if kind == "both" else None,
            security=security,
        )
        addresses[kind] = await worker.start()
        stack.push_async_callback(worker.stop, 0.1)
    gateway = await make_gateway(
        Settings(
            model=runtime.loaded.source.path,
            gateway=GatewaySettings(port=0),
            security=settings,
        ),
        prefill=[addresses["prefill"]],
        decode=[addresses["decode"]],
    )
    port = await gateway.start()
    stack.push_async_callback(gateway.stop, 0.1)
    await gateway.wait_until_serving(30)
    return Servers(addresses, f"127.0.0.1:{port}")


@pytest.fixture
def cluster_token_file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster_token"
    write_secret(path, TOKEN)
    return path


@pytest.fixture
async def servers(runtime: Callable[..., ModelRuntime], cluster_token_file: Path) -> AsyncIterator[Servers]:
    """Every kind of server, with a cluster token. The gateway takes every client."""
    async with AsyncExitStack() as stack:
        yield await _start(
            stack,
            runtime(),
            PeerSecurity(tokens=(TOKEN, NEXT_TOKEN)),
            SecuritySettings(cluster_token_file=cluster_token_file),
        )


def test_every_service_is_offered_by_a_server_of_these_tests() -> None:
    assert set().union(*SERVED.values()) | EDGE == set(all_services())


async def test_no_method_is_open(servers: Servers) -> None:
    """Of any service, on any server: whether it is offered there is nobody's business without the token."""
    services = all_services()
    everything = [method for methods in services.values() for method in methods]
    for kind, address in servers.addresses.items():
        async with grpc.aio.insecure_channel(address) as channel:
            for method in [*everything, *HEALTH, "/kvferry.worker.v1.Worker/Unheard", "/x/y"]:
                if method != OPEN:
                    for metadata in WRONG if method.endswith(("Describe", "Get", "Prefill")) else WRONG[:2]:
                        assert (await status_of(channel, method, metadata))[0] is UNAUTHENTICATED, (kind, method)
            assert (await status_of(channel, OPEN))[0] is grpc.StatusCode.OK
            for service in SERVED[kind]:
                for method in services[service]:
                    for token in (TOKEN, NEXT_TOKEN):
                        code, details = await status_of(channel, method, bearer_metadata(token))
                        assert code not in (UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED), (kind, method, details)
            assert (await status_of(channel, "/x/y", RIGHT))[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_a_refusal_says_what_to_do_and_holds_no_token(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    wrong = new_token()
    with caplog.at_level(logging.DEBUG):
        async with grpc.aio.insecure_channel(servers.addresses["decode"]) as channel:
            for metadata in ((), bearer_metadata(wrong)):
                _, details = await status_of(channel, "/kvferry.worker.v1.Worker/Stats", metadata)
                assert "security.cluster_token_file" in details
                assert wrong not in details and TOKEN not in details
    assert "calls were refused" in caplog.text
    assert wrong not in caplog.text and TOKEN not in caplog.text


async def test_operators_need_the_cluster_token_at_the_gateway(servers: Servers) -> None:
    async with grpc.aio.insecure_channel(servers.gateway) as channel:
        stats = "/kvferry.gateway.v1.Gateway/Stats"
        for metadata in WRONG:
            assert (await status_of(channel, stats, metadata))[0] is UNAUTHENTICATED
        assert (await status_of(channel, stats, RIGHT))[0] is grpc.StatusCode.OK


async def test_clients_of_the_parts_without_the_token_are_refused_and_go_on(servers: Servers) -> None:
    """No client hangs or takes the refusal for an answer: the store is a miss, the directory is away."""
    for security in (PeerSecurity(), PeerSecurity(tokens=(new_token(),))):
        async with StoreClient(
            ClientConfig(address=servers.addresses["store"], lookup_timeout_s=20.0), security=security
        ) as client:
            with pytest.raises(StoreUnavailable, match="UNAUTHENTICATED"):
                await client.lookup([bytes(32)])
        with pytest.raises(OSError, match="UNAUTHENTICATED"):
            await list_members(servers.addresses["directory"], security=security)
        registration = Registration(
            servers.addresses["directory"], address="127.0.0.1:1", roles=["store"], security=security
        )
        registration.start()
        await registration.leave()
    right = PeerSecurity(tokens=(NEXT_TOKEN,))
    assert (await list_members(servers.addresses["directory"], security=right)).members == ()
    membership = DirectoryMembership(servers.addresses["directory"], security=right)
    await anext(membership.watch())
    await membership.close()


# --- ports that would be open -----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1.example", "", "::", "10.1.2.3", "machine-7"])
async def test_an_open_port_beyond_loopback_is_refused(
    host: str, runtime: Callable[..., ModelRuntime], tmp_path: Path
) -> None:
    """Before anything listens."""
    settings = Settings(model=runtime().loaded.source.path, gateway=GatewaySettings(host=host, port=0))
    for server in (
        DirectoryServer(DirectoryConfig(host=host)),
        KVStoreServer(MemoryBackend(capacity_bytes=1000), NodeConfig(host=host)),
        WorkerServer(runtime(), config=PrefillConfig(host=host), store_address=None),
        await make_gateway(settings),
    ):
        with pytest.raises(OpenPortRefused, match=r"security\.(cluster_token|tokens)_file.*security\.insecure"):
            await server.start()
        await server.stop(0.1)


@pytest.mark.parametrize("security", [PeerSecurity(insecure=True), PeerSecurity(tokens=(TOKEN,))])
async def test_one_that_asks_or_is_meant_is_not(security: PeerSecurity) -> None:
    server = DirectoryServer(DirectoryConfig(host="0.0.0.0"), security=security)
    assert (await server.start()).startswith("0.0.0.0:")
    await server.stop(0.1)


def test_what_is_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"))
    assert not any(is_loopback(host) for host in ("", "0.0.0.0", "::", "[::]", "localhost.example", "128.0.0.1"))


def test_no_other_place_makes_channels_and_ports() -> None:
    """But benchmarks, whose processes are on loopback or in networks of their own."""
    makes = re.compile(r"\b(insecure_channel|secure_channel|add_insecure_port|add_secure_port)\(")
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("proto", "kvstore", "prefill", "decode", "deploy")
        for path in (ROOT / folder).rglob("*.py")
        if "_pb2" not in path.name and makes.search(path.read_text())
    }
    assert {path for path in found if not path.startswith("deploy/bench_")} == {
        "proto/peer_security.py",
        "deploy/client_access.py",
    }


# --- the token's file -------------------------------------------------------------------------------------------


def test_a_token_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "folder" / "token"
    write_secret(path, TOKEN)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_tokens(path) == (TOKEN,)
    assert not caplog.text
    with pytest.raises(FileExistsError):
        write_secret(path, NEXT_TOKEN)
    path.write_text(f"# ours\n\n  {TOKEN}\n{NEXT_TOKEN}\n")
    path.chmod(0o640)
    assert read_tokens(path) == (TOKEN, NEXT_TOKEN)
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize("text", ["", "# none\n", "short", "x" * 40 + " y", "ü" * 40, f"{TOKEN}\n" * 9])
def test_what_is_no_token_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)) as caught:
        read_tokens(path)
    assert TOKEN not in str(caught.value)


def test_a_guard_without_a_token_is_none() -> None:
    with pytest.raises(ValueError):
        TokenGuard(())


def test_secrets_do_not_show(certificates: Certificates) -> None:
    security = PeerSecurity(tokens=(TOKEN,), tls=certificates.node())
    assert TOKEN not in repr(security)
    assert "PRIVATE" not in repr(security)
