"""The demo model shared by ranks: its 3 KV and 9 query heads make groups of 3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvferry.deploy.assembly import make_gateway
from kvferry.deploy.client import AsyncClient
from kvferry.deploy.settings import Settings
from kvferry.deploy.spec_file import resolve_spec
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime

BLOCK_SIZE = 64
TEXT = "Decode workers keep a block pool. A block holds the keys and values of its tokens. " * 12


@pytest.fixture(scope="module")
def runtimes() -> Iterator[dict[int, ModelRuntime]]:
    """By ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spec = resolve_spec("kv3", block_size=BLOCK_SIZE)
    made: dict[int, ModelRuntime] = {}
    try:
        for ranks in (1, 3):
            config = ModelConfig(model="demo", spec=spec, dtype="float32", tensor_parallel=ranks)
            made[ranks] = ModelRuntime(config, on_ranks_lost=pytest.fail)
        yield made
    finally:
        for runtime in made.values():
            runtime.close()
        torch.set_num_threads(threads)


@pytest.mark.deep
async def test_the_demo_model_in_groups_of_three(
    runtimes: dict[int, ModelRuntime], serve_workers: Any, make_store: Any
) -> None:
    """Through gateway and store: 1 to 1, 3 to 1, 1 to 3. A hit gives the tokens of its miss, and all give those of one
    rank here, though their last bits differ."""
    store = await make_store()
    settings = Settings.load(model="demo", gateway={"port": 0})
    answers = []
    for prefill, decode in ((1, 1), (3, 1), (1, 3)):
        for _ in range(2):  # workers with nothing in their pools
            workers = await serve_workers(runtimes[prefill], store.address, decode_runtime=runtimes[decode])
            gateway = await make_gateway(settings, prefill=[workers.prefill_address], decode=[workers.decode_address])
            port = await gateway.start()
            await gateway.wait_until_serving(60)
            async with AsyncClient(f"127.0.0.1:{port}") as client:
                messages = [{"role": "user", "content": TEXT + "What does a block hold?"}]
                answers.append(await client.generate(messages=messages, max_tokens=24))
            await gateway.stop(0.2)
    first, *others = answers
    blocks = first.usage.prompt_tokens // BLOCK_SIZE * BLOCK_SIZE
    assert blocks > 0
    # Computed, then fetched; a group of three computes its own; what one rank made is there for the last pair.
    assert [a.usage.cached_tokens for a in answers] == [0, blocks, 0, blocks, blocks, blocks]
    assert all(a.token_ids == first.token_ids for a in others)
