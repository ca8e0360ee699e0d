"""Clients' tokens at the gateway: who gets in, what a change of the file does, and whose tenant a request has."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import yaml
from support.wire_calls import HEALTH, OPEN, all_services, status_of
from typer.testing import CliRunner

from kvferry.deploy.cli import app
from kvferry.deploy.client import AsyncClient, ClientAccess, Unauthenticated
from kvferry.deploy.client_tokens import ClientTokens, read_client_tokens
from kvferry.deploy.edge_security import EdgeSecurity
from kvferry.deploy.gateway_server import GatewayServer
from kvferry.deploy.token_files import make_missing_files, token_entry
from kvferry.proto import inference_pb2, inference_pb2_grpc
from kvferry.proto.bearer import bearer_metadata, token_digest
from kvferry.proto.peer_security import PeerSecurity
from kvferry.proto.token_file import new_token, read_tokens

LIMIT_S = 30.0
ALICE, BOB, OLD = new_token(), new_token(), new_token()
YESTERDAY = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=1)
TOMORROW = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=1)
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


def entries() -> list[dict[str, object]]:
    return [
        token_entry("alice", ALICE, tenant="a", expires=TOMORROW),
        token_entry("bob", BOB, tenant="b"),
        token_entry("old", OLD, tenant="a", expires=YESTERDAY),
    ]


def write(path: Path, content: object) -> None:
    """As a careful operator does: another file takes the place of the old one."""
    new = path.with_suffix(".new")
    new.write_text(content if isinstance(content, str) else yaml.safe_dump({"tokens": content}))
    new.replace(path)


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.yaml"
    write(path, entries())
    return path


@asynccontextmanager
async def client_of(gateway: GatewayServer, token: str | None) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{gateway.port}", access=ClientAccess(token=token)) as client:  # type: ignore[attr-defined]
        yield client


async def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        await asyncio.sleep(0.02)


# --- who gets in ------------------------------------------------------------------------------------------------


async def test_every_method_asks_for_a_token(lab: Any, tokens_file: Path) -> None:
    """Of any service, offered or not, but for the operators' one, which is not for clients."""
    worker = await lab.worker(script=lab.text_script("Hello"))
    gateway = await lab.gateway([worker], edge=EdgeSecurity(tokens_file=tokens_file))
    services = all_services()
    operators = services.pop("kvferry.gateway.v1.Gateway")
    methods = [method for methods in services.values() for method in methods]
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        for method in [*methods, *HEALTH, "/kvferry.inference.v1.Inference/Unheard", "/x/y"]:
            if method != OPEN:
                for metadata in ((), bearer_metadata(new_token()), bearer_metadata(OLD), (("authorization", ALICE),)):
                    assert (await status_of(channel, method, metadata))[0] is UNAUTHENTICATED, method
        assert (await status_of(channel, OPEN))[0] is grpc.StatusCode.OK
        for method in services["kvferry.inference.v1.Inference"]:
            for token in (ALICE, BOB):
                code, _ = await status_of(channel, method, bearer_metadata(token))
                assert code not in (UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED), method
        for method in operators:
            for token in (ALICE, new_token()):
                code, details = await status_of(channel, method, bearer_metadata(token))
                assert code is UNAUTHENTICATED and "operators" in details


async def test_a_refusal_is_one_clear_sentence_and_counted(
    lab: Any, tokens_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await lab.worker(script=lab.text_script("Hello"))
    gateway = await lab.gateway([worker], edge=EdgeSecurity(tokens_file=tokens_file))
    wrong = new_token()
    for token, reason, said in (
        (None, "missing", "asks for a token"),
        (wrong, "unknown", "does not know the token"),
        (OLD, "expired", "is over"),
    ):
        async with client_of(gateway, token) as client:
            for call in (client.models, client.generate):
                with pytest.raises(Unauthenticated, match=said) as caught:
                    await (call("Hi", timeout=LIMIT_S) if call == client.generate else client.models(timeout=LIMIT_S))
                assert (token or "nothing") not in str(caught.value)
        assert gateway._guard.num_refused[reason] == 2
    families = {family.name: family for family in await gateway._families()}
    refused = {s.labels["reason"]: s.value for s in families["kvferry_gateway_calls_refused"].samples}
    assert refused == {"missing": 2, "unknown": 2, "expired": 2, "operator": 0}
    assert worker.requests == []
    assert "calls were refused" in caplog.text
    for secret in (wrong, OLD, ALICE, token_digest(wrong).hex()):
        assert secret not in caplog.text


async def test_the_tenant_is_the_credential_s(lab: Any, tokens_file: Path) -> None:
    """Nothing that a client sends names one: no field of a request, and metadata is not read."""
    worker = await lab.worker(script=lab.text_script("Hello"))
    gateway = await lab.gateway([worker], tenant="everybody", edge=EdgeSecurity(tokens_file=tokens_file))
    for token in (ALICE, BOB):
        async with client_of(gateway, token) as client:
            await client.generate("Hi", timeout=LIMIT_S)
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        claims = (("tenant", "b"), ("kvferry-tenant", "b"), ("x-tenant", "b"), *bearer_metadata(ALICE))
        async for _ in stub.Generate(inference_pb2.GenerateRequest(text="Hi"), metadata=claims, timeout=LIMIT_S):
            pass
    assert [request.tenant for request in worker.requests] == ["a", "b", "a"]
    for message in inference_pb2.DESCRIPTOR.message_types_by_name.values():
        assert not [f.name for f in message.fields if "tenant" in f.name or "namespace" in f.name or "salt" in f.name]


async def test_without_tokens_it_is_the_configured_one(lab: Any) -> None:
    worker = await lab.worker(script=lab.text_script("Hello"))
    gateway = await lab.gateway([worker], tenant="everybody")
    async with client_of(gateway, None) as client:
        await client.generate("Hi", timeout=LIMIT_S)
    assert [request.tenant for request in worker.requests] == ["everybody"]


async def test_two_tenants_may_use_one_request_id(lab: Any, tokens_file: Path) -> None:
    """Neither ends the other's request, nor learns that it runs."""
    worker = await lab.worker(script=[0.5, *lab.text_script("Hello")])
    gateway = await lab.gateway([worker], edge=EdgeSecurity(tokens_file=tokens_file))

    async def ask(token: str) -> str:
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            request = inference_pb2.GenerateRequest(text="Hi", request_id="same")
            call = stub.Generate(request, metadata=bearer_metadata(token), timeout=LIMIT_S)
            return "".join([chunk.text async for chunk in call])

    assert await asyncio.gather(ask(ALICE), ask(BOB)) == ["Hello", "Hello"]
    assert sorted(request.tenant for request in worker.requests) == ["a", "b"]


# --- the file changes -------------------------------------------------------------------------------------------


async def test_rotation_without_a_restart(lab: Any, tokens_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Old and new token overlap as long as both have an entry; a running answer goes on to its end."""
    worker = await lab.worker(script=lab.text_script("Hello"))
    gateway = await lab.gateway([worker], edge=EdgeSecurity(tokens_file=tokens_file))
    tokens, new = gateway._tokens, new_token()

    async def is_in(token: str) -> bool:
        async with client_of(gateway, token) as client:
            try:
                await client.models(timeout=LIMIT_S)
            except Unauthenticated:
                return False
            return True

    assert await is_in(ALICE) and not await is_in(new)
    write(tokens_file, [*entries(), token_entry("alice-2", new, tenant="a")])
    await eventually(lambda: tokens.num_reloads == 1)
    assert await is_in(ALICE) and await is_in(new)

    worker.script = [lab.text_script("Hello")[0], 1.5, *lab.text_script("Hello")[1:]]
    async with client_of(gateway, ALICE) as client:
        answer = client.stream("Hi", timeout=LIMIT_S)
        await anext(answer)
        write(tokens_file, [token_entry("alice-2", new, tenant="a")])
        await eventually(lambda: tokens.num_reloads == 2)
        assert not await is_in(ALICE) and await is_in(new)
        assert [chunk async for chunk in answer][-1].finish_reason

    for number, bad in enumerate(("", "tokens: [", "just words", "tokens: [{name: x}]", "a: 1"), start=1):
        write(tokens_file, bad)
        await eventually(lambda expected=number: tokens.num_failed_reloads == expected)
        assert await is_in(new)
    tokens_file.unlink()
    await eventually(lambda: tokens.num_failed_reloads == 6)
    assert await is_in(new)
    assert "the tokens stay as they are" in caplog.text
    write(tokens_file, [])  # on purpose: nobody
    await eventually(lambda: tokens.num_reloads == 3)
    assert not await is_in(new)
    families = {family.name: family for family in await gateway._families()}
    told = {s.labels["outcome"]: s.value for s in families["kvferry_gateway_token_reloads"].samples}
    assert told == {"taken": 3, "failed": 6}
    for secret in (ALICE, new, token_digest(new).hex()):
        assert secret not in caplog.text


async def test_a_token_ends_while_the_gateway_runs(lab: Any, tokens_file: Path) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=4)
    brief = new_token()
    write(
        tokens_file,
        f"tokens:\n- {{name: x, sha256: {token_digest(brief).hex()}, tenant: t, expires: {soon.isoformat()}}}",
    )
    gateway = await lab.gateway([], serving=False, edge=EdgeSecurity(tokens_file=tokens_file))
    async with client_of(gateway, brief) as client:
        if datetime.datetime.now(datetime.UTC) < soon - datetime.timedelta(seconds=2):  # a slow machine is too late
            await client.models(timeout=LIMIT_S)
        await asyncio.sleep(max(0.0, (soon - datetime.datetime.now(datetime.UTC)).total_seconds()))
        with pytest.raises(Unauthenticated, match="is over"):
            await client.models(timeout=LIMIT_S)


async def test_a_gateway_without_its_file_does_not_start(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"tokens\.yaml"):
        await lab.gateway([], serving=False, edge=EdgeSecurity(tokens_file=tmp_path / "tokens.yaml"))


# --- what a file holds ------------------------------------------------------------------------------------------

DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file"),
        ("tokens: 5", "tokens"),
        (f"tokens: [{{name: a, sha256: {DIGEST}}}]", "tokens.0.tenant"),
        (f"tokens: [{{name: a, sha256: {DIGEST}, tenant: ''}}]", "tokens.0.tenant"),
        (f"tokens: [{{name: a, sha256: {DIGEST}, tenant: {'x' * 2000}}}]", "tokens.0.tenant"),
        (f"tokens: [{{name: 'a b', sha256: {DIGEST}, tenant: t}}]", "tokens.0.name"),
        ("tokens: [{name: a, sha256: 12, tenant: t}]", "tokens.0.sha256"),
        (f"tokens: [{{name: a, sha256: {DIGEST.upper()}, tenant: t}}]", "tokens.0.sha256"),
        (f"tokens: [{{name: a, sha256: {DIGEST}, tenant: t, expires: soon}}]", "tokens.0.expires"),
        (f"tokens: [{{name: a, sha256: {DIGEST}, tenant: t, token: x}}]", "tokens.0.token"),
        (
            f"tokens: [{{name: a, sha256: {DIGEST}, tenant: t}}, {{name: b, sha256: {DIGEST}, tenant: t}}]",
            "same sha256",
        ),
        (
            f"tokens: [{{name: a, sha256: {DIGEST}, tenant: t}}, {{name: a, sha256: {'cd' * 32}, tenant: t}}]",
            "same name",
        ),
        (f"tokens:\n- {{name: a, sha256: {DIGEST}, tenant: t\n  oops", "not YAML"),
        (f"tokens: [{{name: a, sha256: {DIGEST}, tenant: t, expires: 2027-13-45}}]", "not YAML"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_what_is_no_file_of_tokens(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"no file of tokens.*{said}") as caught:
        read_client_tokens(path)
    assert DIGEST not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "over_at"),
    [
        ("2027-01-31", "2027-02-01T00:00:00+00:00"),
        ("'2027-01-31'", "2027-02-01T00:00:00+00:00"),
        ("2027-01-31T12:00:00Z", "2027-01-31T12:00:00+00:00"),
        ("2027-01-31 12:00:00", "2027-01-31T12:00:00+00:00"),
        ("2027-01-31T12:00:00+02:00", "2027-01-31T10:00:00+00:00"),
    ],
)
def test_when_a_token_is_over(written: str, over_at: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(f"tokens: [{{name: a, sha256: {DIGEST}, tenant: t, expires: {written}}}]")
    (entry,) = read_client_tokens(path)
    end = datetime.datetime.fromisoformat(over_at)
    assert entry.is_over(end) and not entry.is_over(end - datetime.timedelta(seconds=1))


def test_many_tokens_are_found_by_their_whole_hash(tmp_path: Path) -> None:
    """Also where the first bytes, which find the candidates, are the same."""
    path = tmp_path / "tokens.yaml"
    digest = token_digest(ALICE).hex()
    near = digest[:8] + f"{int(digest[8:], 16) ^ 1:056x}"
    write(path, [{"name": "near", "sha256": near, "tenant": "n"}, *entries()])
    found = ClientTokens(path).find(ALICE)
    assert found is not None and found.name == "alice"
    write(path, [{"name": "near", "sha256": near, "tenant": "n"}])
    assert ClientTokens(path).find(ALICE) is None


# --- kvferry token ----------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["token", *arguments])


def test_a_new_token_and_its_entry(tmp_path: Path) -> None:
    done = run("new", "alice", "--json", "--expires", "30d")
    made = json.loads(done.output)
    path = tmp_path / "tokens.yaml"
    write(path, [made["entry"]])
    entry = ClientTokens(path).find(made["token"])
    assert entry is not None and (entry.name, entry.tenant) == ("alice", "alice")
    assert entry.expires is not None and 30 <= (entry.expires - datetime.datetime.now(datetime.UTC)).days <= 31
    text = run("new", "bob", "--tenant", "team-b").output
    pasted = "tokens:\n" + text[text.index("  - name") :]
    path.write_text(pasted)
    token = text.splitlines()[0].rsplit(" ", 1)[1]
    found = ClientTokens(path).find(token)
    assert found is not None and found.tenant == "team-b" and len(token) == 43
    assert token not in pasted
    assert "bob: tenant team-b" in run("check", str(path)).output
    for wrong in (("new", "a b"), ("new", "a", "--expires", "soon"), ("new", "a", "--tenant", "x" * 2000)):
        assert run(*wrong).exit_code == 1


def test_setup_makes_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert run("setup", str(folder)).output.count("made ") == 3
    names = ("cluster_token", "client_token", "tokens.yaml")
    assert all((folder / name).stat().st_mode & 0o777 == 0o600 for name in names)
    assert len(read_tokens(folder / "cluster_token")) == 1
    token = (folder / "client_token").read_text().strip()
    assert ClientTokens(folder / "tokens.yaml").find(token) is not None
    before = {name: (folder / name).read_text() for name in names}
    assert make_missing_files(folder) == []
    assert {name: (folder / name).read_text() for name in names} == before


# --- what a client is given -------------------------------------------------------------------------------------


def test_where_a_client_finds_its_token(tmp_path: Path) -> None:
    file, other = tmp_path / "token", tmp_path / "other"
    file.write_text("from-file\n")
    other.write_text("from-variable-s-file\n")
    environment = {"KVFERRY_TOKEN": "from-variable", "KVFERRY_TOKEN_FILE": str(other)}
    assert ClientAccess.find(environ={}) == ClientAccess()
    assert ClientAccess.find(token_file=file, environ=environment).token == "from-file"
    assert ClientAccess.find(environ=environment).token == "from-variable"
    assert ClientAccess.find(environ={"KVFERRY_TOKEN_FILE": str(other)}).token == "from-variable-s-file"
    system = ClientAccess.find(ca="system", environ={"KVFERRY_CA": str(file)})
    assert system.tls and system.ca is None
    assert ClientAccess.find(environ={"KVFERRY_CA": str(file)}).ca == b"from-file\n"
    assert "from-file" not in repr(ClientAccess(token="from-file", tls=True, cert=b"c", key=b"secret"))
    with pytest.raises(OSError):
        ClientAccess.find(token_file=tmp_path / "missing", environ={})
    for wrong in ({"token": "two\nlines"}, {"token": "ü"}, {"cert": b"x", "tls": True}, {"ca": b"x"}):
        with pytest.raises(ValueError):
            ClientAccess(**wrong)  # type: ignore[arg-type]


def test_a_gateway_s_peers_are_not_its_clients() -> None:
    assert PeerSecurity(tokens=(new_token(),)).guards()
    assert not PeerSecurity().guards()
    assert os.environ.get("KVFERRY_TOKEN") is None, "tests of the client read the environment"
