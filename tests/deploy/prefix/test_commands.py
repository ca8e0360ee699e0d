"""`kvferry prefix` against real nodes and a real prefill worker. Their payloads are made up: see test_end_to_end.py."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.bundles import payload_of, record_of, small_chain, write_bundle
from support.processes import NodeProcess, PrefillProcess
from typer.testing import CliRunner

from kvferry.deploy.cli import app
from kvferry.deploy.models import find_model, load_tokenizer
from kvferry.deploy.prefix.deployment import describe
from kvferry.deploy.prefix.naming import PromptName, chain_of_prompt
from kvferry.kvstore.bundle_chain import Chain
from kvferry.kvstore.bundle_reader import BundleReader
from kvferry.kvstore.bundle_transfer import num_stored
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.config import ClientConfig

TEXT = "The quick brown fox jumps over the lazy dog. " * 12


@dataclass
class Lab:
    worker: str
    other_worker: str
    """Of another model."""
    model: Path
    folder: Path
    chain: Chain
    """Of TEXT as a chat."""
    start_node: Callable[..., NodeProcess]

    def run(self, *arguments: object, ok: bool = True) -> str:
        """What a command printed, standard error included."""
        result = CliRunner().invoke(app, ["prefix", *map(str, arguments)])
        assert result.exit_code == (0 if ok else 1), result.output
        assert "Traceback" not in result.output
        return result.output

    def node(self, chain: Chain | None = None) -> str:
        """A new node, with the records of a chain."""
        address = self.start_node().address
        if chain is not None:

            async def fill(client: StoreClient) -> None:
                for index, key in enumerate(chain.keys):
                    assert await client.put(key, record_of(chain, index))

            self.ask(address, fill)
        return address

    def ask(self, address: str, call: Callable[[StoreClient], Any]) -> Any:
        async def run() -> Any:
            async with StoreClient(ClientConfig(address=address, lookup_timeout_s=10.0)) as client:
                return await call(client)

        return asyncio.run(run())

    def held(self, address: str, chain: Chain | None = None) -> int:
        return self.ask(address, lambda client: num_stored(client, chain or self.chain))

    def prompt(self) -> Path:
        path = self.folder / "prompt.txt"
        path.write_text(TEXT)
        return path


@pytest.fixture(scope="module")
def workers(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("workers")
    started = [
        PrefillProcess(folder / f"{family}.log", str(tiny_model(family)), block_size=32, threads=1)
        for family in ("llama", "qwen3")
    ]
    yield started[0].address, started[1].address
    for process in started:
        process.kill()


@pytest.fixture
def lab(
    workers: tuple[str, str],
    tiny_model: Callable[[str], Path],
    start_node: Callable[..., NodeProcess],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Lab:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    name = PromptName(path=tmp_path)
    chain = chain_of_prompt(name, TEXT, worker=workers[0], tenant="default", model=None)
    return Lab(workers[0], workers[1], tiny_model("llama"), tmp_path, chain, start_node)


def test_the_chain_of_a_prompt_is_the_gateways(lab: Lab) -> None:
    tokenizer = load_tokenizer(find_model(str(lab.model)))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXT}], add_generation_prompt=True, return_dict=False
    )
    assert list(lab.chain.token_ids or []) == ids[: len(ids) // 32 * 32]
    raw = chain_of_prompt(
        PromptName(path=lab.folder, raw=True), TEXT, worker=lab.worker, tenant="default", model=str(lab.model)
    )
    assert list(raw.token_ids or []) == tokenizer.encode(TEXT)[: raw.num_tokens]
    assert lab.chain.namespace == describe(lab.worker, "default").namespace
    assert PromptName(path=lab.prompt(), question="Why?").text() == f"{TEXT}\n\nWhy?"


def test_export_verify_list_import_rm(lab: Lab) -> None:
    key, bundle = lab.folder / "key", lab.folder / "fox.kvbundle"
    source, target = lab.node(lab.chain), lab.node()
    public = lab.run("keygen", "-o", key).splitlines()[-1]
    export = ["export", "--prompt-file", lab.prompt(), "--worker", lab.worker, "--store", source]
    said = lab.run(*export, "-o", bundle, "--sign", key)
    assert f"{lab.chain.num_tokens} tokens in {len(lab.chain.keys)} blocks" in said
    assert f"signed with the key {public.split()[1]}" in said

    said = lab.run("verify", bundle)
    for words in (
        "every byte is as the bundle's digest says",
        f"{lab.chain.num_tokens} in {len(lab.chain.keys)} blocks of 32",
        lab.chain.keys[-1].hex(),
        "times the file",
        "not trusted here",
    ):
        assert words in said
    assert "unknown signer" in lab.run("list", bundle)

    to = ["--worker", lab.worker, "--store", target]
    said = lab.run("import", bundle, *to, ok=False)
    assert "is not trusted here" in said
    assert "is not trusted here" in lab.run("import", bundle, *to, "--insecure-accept-unsigned", ok=False)
    assert lab.held(target) == 0
    hex_key = public.split()[1]
    assert f"{len(lab.chain.keys)} blocks stored" in lab.run("import", bundle, *to, "--trust-this-signer", hex_key)
    assert lab.held(target) == len(lab.chain.keys)

    said = lab.run("rm", "--chain-of", bundle, "--store", target)
    assert f"{len(lab.chain.keys)} of {len(lab.chain.keys)} blocks were in the store" in said
    assert lab.held(target) == 0

    trust = lab.folder / "config" / "kvferry" / "trusted-signers"
    trust.parent.mkdir(parents=True)
    trust.write_text(public + "\n")
    assert "trusted here" in lab.run("verify", bundle)
    assert "0 were there" in lab.run("import", bundle, *to)
    assert f"0 blocks stored (0 bytes), {len(lab.chain.keys)} were there" in lab.run("import", bundle, *to)

    assert "is there already" in lab.run(*export, "-o", bundle, ok=False)
    assert "unsigned: an import will refuse it" in lab.run(*export, "-o", bundle, "--force")
    assert "nobody" in lab.run("verify", bundle)
    assert "--insecure-accept-unsigned" in lab.run("import", bundle, *to, ok=False)
    lab.run("import", bundle, *to, "--insecure-accept-unsigned")
    assert "unsigned" in lab.run("list", bundle)


def test_another_model_is_refused_by_what_differs(lab: Lab) -> None:
    bundle = write_bundle(lab.folder / "x", lab.chain)
    target = lab.node()
    arguments = ["import", bundle, "--store", target, "--insecure-accept-unsigned", "--worker"]
    said = lab.run(*arguments, lab.other_worker, ok=False)
    assert "does not fit the deployment of 'tiny-qwen3" in said
    for words in ("these differ: the model's weights", "the numerics class"):
        assert words in said
    for words in ("the tokenizer", "the quantization spec", "the layout version", "the block size"):
        assert words not in said
    assert lab.held(target) == 0
    lab.run(*arguments, lab.worker)

    alien = write_bundle(lab.folder / "y", small_chain(layout_version=99))
    said = lab.run("import", alien, "--store", target, "--insecure-accept-unsigned", "--worker", lab.worker, ok=False)
    for words in ("the model's weights", "the tokenizer", "the quantization spec", "the layout version"):
        assert words in said
    said = lab.run("push", target, "--chain-of", bundle, "--store", target, "--to-worker", lab.other_worker, ok=False)
    assert "does not fit" in said


def test_another_tenant(lab: Lab) -> None:
    bundle = write_bundle(lab.folder / "x", lab.chain)
    target = lab.node()
    arguments = ["--store", target, "--worker", lab.worker, "--insecure-accept-unsigned", "--tenant", "other"]
    lab.run("import", bundle, *arguments)
    assert lab.held(target) == 0
    other = lab.chain.under_tenant("other")
    assert lab.held(target, other) == len(other.keys)

    async def payloads(client: StoreClient) -> list[bytes]:
        records = client.get(other.keys, namespace=other.namespace.digest())
        return [bytes(record.payload) async for record in records]

    assert lab.ask(target, payloads) == [payload_of(lab.chain, index) for index in range(len(lab.chain.keys))]
    kept_back = write_bundle(lab.folder / "y", lab.chain, tokens=False)
    assert "--no-tokens" in lab.run("import", kept_back, *arguments, ok=False)
    lab.run("import", kept_back, *arguments[:-2])
    assert lab.held(target) == len(lab.chain.keys)


def test_push_and_pull(lab: Lab) -> None:
    source, target, third = lab.node(lab.chain), lab.node(), lab.node()
    prompt = ["--prompt-file", lab.prompt(), "--worker", lab.worker]
    last = lab.chain.keys[1].hex()
    assert "2 blocks stored" in lab.run("push", target, *prompt, "--store", source, "--until", last)
    assert lab.held(target) == 2
    said = lab.run("push", target, *prompt, "--store", source, "--to-worker", lab.worker)
    assert f"{len(lab.chain.keys) - 2} blocks stored" in said
    assert "2 were there" in said
    assert "--trust-node" in lab.run("pull", target, *prompt, "--store", third, ok=False)
    assert lab.held(third) == 0
    lab.run("pull", target, *prompt, "--store", third, "--trust-node")
    assert lab.held(third) == len(lab.chain.keys)
    assert "lacks block 0" in lab.run("pull", lab.node(), *prompt, "--store", lab.node(), "--trust-node", ok=False)


def test_no_tokens_and_chain_of(lab: Lab) -> None:
    """A bundle without token ids can be sent on: its keys name the chain."""
    source, target = lab.node(lab.chain), lab.node()
    bundle, again = lab.folder / "x", lab.folder / "y"
    export = ["export", "--worker", lab.worker, "--store", source]
    lab.run(*export, "--prompt-file", lab.prompt(), "-o", bundle, "--no-tokens")
    assert "kept back" in lab.run("verify", bundle)
    lab.run("push", target, "--chain-of", bundle, "--store", source)
    assert lab.held(target) == len(lab.chain.keys)
    lab.run("export", "--chain-of", bundle, "--until", lab.chain.keys[0].hex(), "-o", again, "--store", target)
    with BundleReader(again) as reader:
        assert reader.header.chain.keys == lab.chain.keys[:1]


def test_what_cannot_be_done_says_what_to_do(lab: Lab) -> None:
    prompt, node = lab.prompt(), lab.node()
    good = ["--worker", lab.worker, "--store", node]
    out = ["-o", lab.folder / "out"]
    short = lab.folder / "short"
    short.write_text("Hi")
    binary = lab.folder / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    cases: list[tuple[list[object], str]] = [
        (["export", *out, "--prompt-file", prompt, *good], "kvferry prefix build"),
        (["export", *out, *good], "either --prompt-file or --chain-of"),
        (["export", *out, "--prompt-file", short, "--raw", *good], "less than a block of 32"),
        (["export", *out, "--prompt-file", binary, *good], "not UTF-8"),
        (["export", *out, "--prompt-file", lab.folder / "none", *good], "No such file"),
        (["export", *out, "--prompt-file", prompt, "--worker", node], "is no worker"),
        (["export", *out, "--prompt-file", prompt, "--worker", "127.0.0.1:1"], "no worker answers at 127.0.0.1:1"),
        (["export", *out, "--prompt-file", prompt, *good, "--until", "ab"], "64 hex digits"),
        (["export", *out, "--prompt-file", prompt, *good, "--until", "ab" * 32], "blocks has this key"),
        (["export", *out, "--prompt-file", prompt, *good, "--model", "nowhere"], "--model"),
        (["export", *out, "--prompt-file", prompt, "--worker", lab.worker, "--store", "127.0.0.1:1"], "the store at"),
        (["export", *out, "--prompt-file", prompt, *good, "--sign", prompt], "chmod 600"),
        (["verify", prompt], "does not start like a bundle"),
        (["verify", lab.folder / "none"], "No such file"),
        (["import", prompt, *good], "does not start like a bundle"),
        (["push", "nowhere", "--prompt-file", prompt, *good], "address must be host:port"),
        (["build", "--prompt-file", prompt, *good, "--address", "127.0.0.1:1"], "127.0.0.1:1"),
    ]
    for arguments, words in cases:
        assert words in lab.run(*arguments, ok=False), arguments
    assert not [name for name in os.listdir(lab.folder) if name.startswith("out")]


def test_another_tokenizer_is_refused(lab: Lab) -> None:
    tokenizer = load_tokenizer(find_model(str(lab.model)))
    tokenizer.chat_template = str(tokenizer.chat_template) + " "
    changed = lab.folder / "changed"
    tokenizer.save_pretrained(changed)
    (changed / "config.json").write_text((lab.model / "config.json").read_text())
    said = lab.run(
        *("export", "-o", lab.folder / "x", "--prompt-file", lab.prompt(), "--worker", lab.worker, "--model", changed),
        ok=False,
    )
    assert "is not the one of the deployment" in said


def test_list_goes_on_after_a_damaged_one(lab: Lab) -> None:
    good = write_bundle(lab.folder / "good", lab.chain)
    bad = lab.folder / "bad"
    bad.write_bytes(good.read_bytes()[:100])
    said = lab.run("list", bad, good, ok=False)
    assert "the file ends inside the bundle's header" in said
    assert f"{good}: {lab.chain.model_name}" in said
    assert "1 of 2 files" in said


def test_names_from_a_bundle_do_not_steer_the_terminal(lab: Lab) -> None:
    chain = small_chain(tenant="t\x1b]0;owned\x07\n")
    for command in ("verify", "list"):
        said = lab.run(command, write_bundle(lab.folder / command, chain))
        assert "\x1b" not in said
        assert "\x07" not in said
        assert "t\ufffd]0;owned" in said
