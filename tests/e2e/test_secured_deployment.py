"""A deployment of processes with TLS, a cluster token and clients' tokens: the answers of an open one, and the commands
that people use with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support.certificates import Certificates
from support.cluster import Cluster

from kvferry.deploy.client import AsyncClient, ClientAccess, Unauthenticated, Unavailable
from kvferry.deploy.client_resume import RetryPolicy
from kvferry.deploy.token_files import token_entry
from kvferry.proto.peer_security import PeerSecurity
from kvferry.proto.token_file import new_token, write_secret

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("store", "prefill", "decode", "gateway")
LIMIT_S = 120.0
CLUSTER_TOKEN, ALICE, BOB = new_token(), new_token(), new_token()
Answer = tuple[list[int], int]
"""Tokens, and how many of the prompt's came from the store."""


@dataclass
class Secured:
    cluster: Cluster
    ca: Path
    folder: Path

    def access(self, token: str | None) -> ClientAccess:
        return ClientAccess(tls=True, ca=self.ca.read_bytes(), token=token)

    def address(self, name: str) -> str:
        return self.cluster.procs[name].address

    def kvferry(
        self, *arguments: str, token: str | None = ALICE, peers: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command as its user calls it, with credentials in the environment."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("KVFERRY_")}
        environment = {**clean, "PYTHONPATH": str(ROOT / "src"), "KVFERRY_CA": str(self.ca)}
        if token is not None:
            environment["KVFERRY_TOKEN"] = token
        if peers:
            security = yaml.safe_load(self.cluster.config.read_text())["security"]
            environment["KVFERRY_SECURITY"] = json.dumps(security)
        return subprocess.run(
            [sys.executable, "-m", "kvferry.deploy.cli", *arguments],
            capture_output=True, text=True, timeout=LIMIT_S, env=environment,
        )  # fmt: skip


def start_one_of_each(cluster: Cluster) -> None:
    async def start() -> None:
        cluster.start(cluster.directory)
        await cluster.until_joined(*(cluster.add(kind, kind) for kind in KINDS))

    asyncio.run(start())


async def ask(address: str, access: ClientAccess, prompts: list[list[int]]) -> list[Answer]:
    """Greedy and sampled answers."""
    async with AsyncClient(address, access=access) as client:
        answers = []
        for number, token_ids in enumerate(prompts):
            answer = await client.generate(
                token_ids=token_ids, max_tokens=16, ignore_eos=True, temperature=number % 2 * 0.9, seed=7,
                timeout=LIMIT_S,
            )  # fmt: skip
            answers.append((answer.token_ids, answer.usage.cached_tokens))
        return answers


@pytest.fixture(scope="module")
def prompts(make_prompt: Callable[..., list[int]]) -> list[list[int]]:
    return [make_prompt(200 + 41 * i, seed=i) for i in range(3)]


@pytest.fixture(scope="module")
def secured(
    tiny_model: Callable[[str], Path], certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    write_secret(folder / "cluster_token", CLUSTER_TOKEN)
    entries = [token_entry(name, token, tenant=name) for name, token in (("alice", ALICE), ("bob", BOB))]
    (folder / "tokens.yaml").write_text(yaml.safe_dump({"tokens": entries}))
    cert, key = certificates.issue("127.0.0.1")
    security = {
        "cluster_token_file": str(folder / "cluster_token"),
        "tokens_file": str(folder / "tokens.yaml"),
        "tls": {"cert": str(cert), "key": str(key), "ca": str(certificates.ca)},
    }
    peers = PeerSecurity(tokens=(CLUSTER_TOKEN,), tls=certificates.node("127.0.0.1"))
    text = yaml.safe_dump({"security": security})
    with Cluster(folder, tiny_model("llama"), security=text, peers=peers) as cluster:
        start_one_of_each(cluster)
        yield Secured(cluster, certificates.ca, folder)


def test_the_answers_are_those_of_an_open_deployment(
    secured: Secured,
    prompts: list[list[int]],
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Computed, and from the store; and the store finds for a tenant what that tenant computed, nothing else."""
    with Cluster(tmp_path_factory.mktemp("open"), tiny_model("llama")) as plain:
        start_one_of_each(plain)
        gateway = plain.procs["gateway"].address
        expected = [tokens for tokens, _ in asyncio.run(ask(gateway, ClientAccess(), prompts))]
    gateway = secured.address("gateway")
    for name, token in (("alice", ALICE), ("bob", BOB)):
        first = asyncio.run(ask(gateway, secured.access(token), prompts))
        again = asyncio.run(ask(gateway, secured.access(token), prompts))
        assert [tokens for tokens, _ in first] == [tokens for tokens, _ in again] == expected
        assert [cached for _, cached in first] == [0, 0, 0], f"{name} had what another tenant computed"
        assert all(cached >= 160 for _, cached in again), f"{name} did not have what it computed: {again}"


def test_strangers(secured: Secured, prompts: list[list[int]]) -> None:
    gateway, once = secured.address("gateway"), RetryPolicy(max_attempts=1)

    async def refused(access: ClientAccess, error: type[Exception]) -> None:
        async with AsyncClient(gateway, access=access, retry=once) as client:
            with pytest.raises(error):
                await client.generate(token_ids=prompts[0], timeout=LIMIT_S)

    for token in (None, new_token(), CLUSTER_TOKEN):  # a process of the deployment is no client
        asyncio.run(refused(secured.access(token), Unauthenticated))
    asyncio.run(refused(ClientAccess(token=ALICE), Unavailable))


def test_the_commands(secured: Secured, tmp_path: Path) -> None:
    gateway, worker, store = (secured.address(name) for name in ("gateway", "prefill", "store"))
    text = " ".join(f"word{i}" for i in range(120))
    (tmp_path / "prompt").write_text(text)
    prompt = ["--prompt-file", str(tmp_path / "prompt"), "--raw"]
    ask = ["generate", "--address", gateway, *prompt, "--max-tokens", "4", "--json"]

    done = secured.kvferry(*ask)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 4
    token_file = tmp_path / "token"
    token_file.write_text(ALICE + "\n")
    done = secured.kvferry(*ask, "--token-file", str(token_file), "--ca", str(secured.ca), token=None)
    assert done.returncode == 0, done.stderr
    done = secured.kvferry(*ask, "--prefetch")
    assert done.returncode == 0, done.stderr
    done = secured.kvferry(*ask, token=None)
    assert done.returncode == 1 and "asks for a token" in done.stderr and "Traceback" not in done.stderr

    members = ["members", "--directory", secured.cluster.directory.address]
    done = secured.kvferry(*members, "--config", str(secured.cluster.config), peers=False)
    assert done.returncode == 0 and gateway in done.stdout, done.stderr
    done = secured.kvferry(*members, peers=False)
    assert done.returncode == 1 and "UNAVAILABLE" in done.stderr

    place = ["--worker", worker, "--store", store]
    bundle = tmp_path / "bundle.kvp"
    done = secured.kvferry("prefix", "build", "--address", gateway, *prompt, *place, "--tenant", "alice")
    assert done.returncode == 0, done.stderr
    done = secured.kvferry(
        "prefix", "--config", str(secured.cluster.config), "export", *prompt, *place, "--tenant", "alice",
        "-o", str(bundle), peers=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = secured.kvferry("prefix", "list", "--store", store)
    assert done.returncode == 0 and "records" in done.stdout, done.stderr
    done = secured.kvferry("prefix", "list", "--store", store, peers=False)
    assert done.returncode == 1

    done = secured.kvferry(
        "bench", "serve", "--address", gateway, "--num-prompts", "2", "--input-len", "40", "--output-len", "3",
        "--worker", secured.address("decode"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_no_secret_is_in_a_log(secured: Secured) -> None:
    logs = "".join(path.read_text(errors="replace") for path in secured.folder.glob("*.log"))
    assert "calls were refused" in logs, "the scan sees the refusals of the tests before"
    key = (secured.ca.parent / "127.0.0.1.key").read_text().splitlines()[1]
    for secret in (CLUSTER_TOKEN, ALICE, BOB, key):
        assert secret not in logs


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["directory", "--host", "0.0.0.0", "--port", "0"], "security.cluster_token_file"),
        (["store", "--host", "0.0.0.0"], "security.cluster_token_file"),
        (["gateway", "--host", "0.0.0.0", "--port", "0"], "security.tokens_file"),
        (["worker", "--host", "0.0.0.0"], "security.cluster_token_file"),
        (["serve", "--host", "0.0.0.0"], "security.tokens_file"),
    ],
)
def test_an_open_port_is_refused_by_the_command(
    arguments: list[str], said: str, tiny_model: Callable[[str], Path]
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "KVFERRY_MODEL": str(tiny_model("llama"))}
    done = subprocess.run(
        [sys.executable, "-m", "kvferry.deploy.cli", *arguments],
        capture_output=True, text=True, timeout=LIMIT_S, env=environment,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("kvferry: 0.0.0.0:") and said in last and "Traceback" not in done.stderr
