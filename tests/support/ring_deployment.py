"""A deployment with two store nodes, one of which is killed and taken out: `python -m support.ring_deployment MODEL`.

A process of its own, because it starts a Ray. Prints what came of each request as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

from kvferry.deploy.app import Deployment
from kvferry.deploy.client import Client
from kvferry.deploy.settings import Settings
from kvferry.kvstore.ring import StoreRing
from kvferry.kvstore.ring_config import RingConfig

PROMPT = "The quick brown fox jumps over the lazy dog. " * 30


async def records(ring: RingConfig) -> dict[str, int]:
    async with StoreRing(ring) as store:
        told = await store.stats_by_node(timeout_s=5.0)
        return {address: -1 if stats is None else stats.records for address, stats in told.items()}


def main(model: str) -> None:
    settings = Settings(
        model=model,
        preset="kv16",
        block_size=32,
        gateway={"port": 0},
        store={"port": 0, "count": 2, "memory": 64 << 20, "lookup_timeout": 10.0},
        prefill={"port": 0, "fetch": "always"},
        decode={"port": 0, "kv_memory": 16 << 20, "prefix_caching": False},
    )
    answers = []
    with Deployment(settings) as deployment, Client(deployment.address) as client:
        assert deployment.store is not None

        def ask() -> None:
            answer = client.generate(PROMPT, max_tokens=6)
            answers.append({"tokens": answer.token_ids, "cached": answer.usage.cached_tokens})

        ask()
        ask()
        for number in range(3):  # so that both nodes hold something
            client.generate(f"{number} {PROMPT}", max_tokens=1)
        held = asyncio.run(records(deployment.store))
        os.kill(deployment.processes["store-1"], signal.SIGKILL)
        ask()
        deployment.set_store_nodes(deployment.store.nodes[:1])
        ask()
        ask()
        after = asyncio.run(records(deployment.store))
        names = sorted(deployment.processes)
    print(json.dumps({"answers": answers, "held": held, "after": after, "names": names}))


if __name__ == "__main__":
    main(sys.argv[1])
