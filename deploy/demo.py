"""The demo: one long document, four requests, and whether the cache changed an answer."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvferry.deploy.app import Deployment
from kvferry.deploy.client import Client, ClientAccess
from kvferry.deploy.security_settings import SecuritySettings
from kvferry.deploy.settings import Settings
from kvferry.kvstore.ring import StoreRing
from kvferry.kvstore.ring_config import RingConfig

FIRST_QUESTION = "Which port does the gateway use?"
OTHER_QUESTION = "How many tokens does a page hold? Answer in one sentence."


@dataclass(frozen=True)
class DemoRequest:
    """One row of the demo's result."""

    name: str
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    output_token_ids: list[int]
    text: str
    kv_bytes_moved: int
    kv_bytes_bf16: int
    seconds_per_token: float
    """Of the decode steps after the first token."""


def run_demo(settings: Settings, *, document: Path | None, json_path: Path | None, max_tokens: int) -> bool:
    """Runs the demo and prints its table; True when the repeated requests gave the first one's tokens."""
    console = Console(width=max(100, Console().width))
    text = document.read_text() if document else (files("kvferry.deploy") / "handbook.md").read_text()
    console.print("Starting store, prefill worker, decode worker and gateway under a local Ray ...")
    started = time.monotonic()
    settings = settings.model_copy(update={"security": SecuritySettings()})  # on loopback, with a client of its own
    with Deployment(settings) as deployment, Client(deployment.address, access=ClientAccess()) as client:
        console.print(f"... serving on {deployment.address} after {time.monotonic() - started:.1f} s")
        for name, pid in deployment.processes.items():
            console.print(f"    {name:10} process {pid}")
        model = client.models()[0]

        def ask(name: str, question: str) -> DemoRequest:
            return _ask(client, console, name, f"{text}\n\n{question}", max_tokens)

        requests = [
            ask("(0) first request", FIRST_QUESTION),
            ask("(1) other question", OTHER_QUESTION),
            ask("(2) first again", FIRST_QUESTION),
        ]
        assert deployment.store is not None
        wiped = asyncio.run(_wipe(deployment.store))
        console.print(f"\n[bold]The store is wiped[/bold]: {wiped} blocks deleted.")
        requests.append(ask("(3) first, wiped", FIRST_QUESTION))
    first, _, again, after_wipe = requests
    identical = first.output_token_ids == again.output_token_ids == after_wipe.output_token_ids
    _print_table(console, requests, model.id, model.effective_bits, model.kernels, identical)
    if json_path is not None:
        result = {
            "model": model.id,
            "kernels": model.kernels,
            "effective_bits": model.effective_bits,
            "identical": identical,
            "requests": [asdict(r) for r in requests],
        }
        json_path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return identical


def _ask(client: Client, console: Console, name: str, prompt: str, max_tokens: int) -> DemoRequest:
    console.print(f"\n[bold]{name}[/bold]")
    sent = time.monotonic()
    ttft = 0.0
    pieces: list[str] = []
    ids: list[int] = []
    usage = None
    for chunk in client.stream(messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens):
        ttft = ttft or time.monotonic() - sent
        pieces.append(chunk.text)
        ids.extend(chunk.token_ids)
        usage = chunk.usage or usage
        console.print(chunk.text, end="", markup=False, highlight=False)
    console.print()
    assert usage is not None
    steps = max(1, len(ids) - 1)
    return DemoRequest(
        name=name,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        ttft_s=ttft,
        output_token_ids=ids,
        text="".join(pieces),
        kv_bytes_moved=usage.kv_bytes_moved,
        kv_bytes_bf16=usage.kv_bytes_bf16,
        seconds_per_token=(time.monotonic() - sent - ttft) / steps,
    )


async def _wipe(nodes: RingConfig) -> int:
    async with StoreRing(nodes) as store:
        return await store.delete_all()


def _print_table(
    console: Console, requests: list[DemoRequest], model: str, bits: float, kernels: str, identical: bool
) -> None:
    table = Table(title=f"{model}, kernels {kernels}", show_lines=False)
    for column in ("request", "prompt", "cached", "TTFT", "per token", "KV moved", "at 16 bits", "ratio"):
        table.add_column(column, justify="left" if column == "request" else "right")
    for r in requests:
        table.add_row(
            r.name,
            f"{r.prompt_tokens} tok",
            f"{r.cached_tokens} tok",
            f"{r.ttft_s:.2f} s",
            f"{r.seconds_per_token * 1000:.0f} ms",
            f"{r.kv_bytes_moved / 1e6:.1f} MB",
            f"{r.kv_bytes_bf16 / 1e6:.1f} MB",
            f"{r.kv_bytes_bf16 / r.kv_bytes_moved:.2f}x" if r.kv_bytes_moved else "-",
        )
    console.print()
    console.print(table)
    console.print(
        f"effective bits a value around 4,096 tokens (scales, zero points, sinks, fp16 tail of mean length): {bits:.2f}"
    )
    verdict = "[green]yes[/green]" if identical else "[red]NO[/red]"
    console.print(f"(2) and (3) gave exactly the tokens of the first request: {verdict}")
