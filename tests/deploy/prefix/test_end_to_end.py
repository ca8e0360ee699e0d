"""One deployment computes a prefix, another one uses it: real processes, and a file in between."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.processes import NodeProcess, Process
from support.serving import BLOCK_SIZE

ROOT = Path(__file__).resolve().parents[3]
TEXT = "The quick brown fox jumps over the lazy dog. " * 25


class Deployed:
    """A store node, and a process with workers and gateway; commands run in processes of their own, too."""

    def __init__(self, folder: Path, model: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._node = NodeProcess(folder / "node.log")
        self.store = self._node.address
        self._serving = Process(
            [sys.executable, "-m", "support.serving", str(model), self.store], folder / "serving.log"
        )

    def wait(self) -> None:
        self.worker = self._serving.wait_for_line("worker on ").rsplit(" ", 1)[1]
        self.gateway = self._serving.wait_for_line("gateway on ").rsplit(" ", 1)[1]

    def stop(self) -> None:
        self._serving.kill()
        self._node.kill()

    def kvferry(self, *arguments: object, ok: bool = True) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "kvferry.deploy.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            env=dict(os.environ, PYTHONPATH=str(ROOT / "src"), XDG_CONFIG_HOME=str(self._folder)),
            check=False,
        )
        assert done.returncode == (0 if ok else 1), done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if ok else done.stderr

    def prefix(self, command: str, *arguments: object, ok: bool = True) -> str:
        return self.kvferry("prefix", command, *arguments, "--worker", self.worker, "--store", self.store, ok=ok)

    def generate(self, *arguments: object) -> Any:
        answer = self.kvferry("generate", *arguments, "--address", self.gateway, "--max-tokens", "12", "--json")
        return json.loads(answer)


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Callable[..., Deployed]]:
    started: list[Deployed] = []

    def start(model: Path) -> Deployed:
        started.append(Deployed(tmp_path / f"deployment-{len(started)}", model))
        started[-1].wait()
        return started[-1]

    yield start
    for deployed in started:
        deployed.stop()


def test_a_prefix_computed_here_is_used_there(
    deploy: Callable[[Path], Deployed], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    prompt, bundle, key = tmp_path / "prompt.txt", tmp_path / "prompt.kvbundle", tmp_path / "key"
    prompt.write_text(TEXT)
    asked = ["--prompt-file", prompt]
    a = deploy(tiny_model("llama"))
    public = a.kvferry("prefix", "keygen", "-o", key).splitlines()[-1].split()[1]
    said = a.prefix("export", *asked, "-o", bundle, "--sign", key, ok=False)
    assert "kvferry prefix build" in said
    said = a.prefix("build", *asked, "--address", a.gateway)
    assert " 0 tokens were there before" in said
    a.prefix("export", *asked, "-o", bundle, "--sign", key)
    here = a.generate(*asked)
    assert len(here["token_ids"]) == 12
    blocks = here["usage"]["prompt_tokens"] // BLOCK_SIZE
    assert blocks >= 3
    a.stop()

    said = a.kvferry("prefix", "verify", bundle)
    assert "every byte is as the bundle's digest says" in said
    match = re.search(r"([\d.]+) times the file", said)
    assert match is not None
    assert float(match.group(1)) > 3  # kv3 in an fp16 world, sinks and head of a short prefix included

    b = deploy(tiny_model("llama"))
    said = b.prefix("import", bundle, ok=False)
    assert "not trusted here" in said
    said = b.prefix("import", bundle, "--trust-this-signer", public)
    assert f"{blocks} blocks stored" in said
    there = b.generate(*asked)
    assert there["usage"]["cached_tokens"] == (there["usage"]["prompt_tokens"] - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert there["token_ids"] == here["token_ids"]
    question = b.generate(*asked, "--question", "Which animal is lazy?")
    assert question["usage"]["cached_tokens"] > 0
    assert b.prefix("rm", *asked).startswith(f"{blocks} of {blocks} blocks")
    b.stop()

    c = deploy(tiny_model("mistral"))
    said = c.prefix("import", bundle, "--trust-this-signer", public, ok=False)
    assert "does not fit the deployment of 'tiny'" in said
    assert "the model's weights" in said
    cold = c.generate(*asked)
    assert cold["usage"]["cached_tokens"] == 0
