"""One store node or worker of `kvferry bench router`: `python -m kvferry.deploy.bench_router.process CONFIG`.

CONFIG is JSON. The process says {"address": host:port} on a line, serves on loopback, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

import torch

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.bench_router.slow_link import SlowLink
from kvferry.deploy.spec_file import resolve_spec
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime, WorkerServer
from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.malloc import tune_malloc
from kvferry.kvstore.server import KVStoreServer
from kvferry.kvstore.store_config import StoreConfig, make_backend
from kvferry.prefill.config import PrefillConfig

STORE_BYTES = 2 * 2**30
KV_MEMORY = 256 * 2**20


async def _store(config: dict[str, Any]) -> None:
    is_shaped = config["bits_per_s"] is not None
    # The bulk port would lead past the relay.
    node = NodeConfig(bulk_port=None if is_shaped else 0)
    server = KVStoreServer(make_backend(StoreConfig(memory_bytes=STORE_BYTES)), node)
    await server.start()
    address = server.address
    link = None
    if is_shaped:
        link = SlowLink(address, bits_per_s=config["bits_per_s"])
        address = await link.start()
    await _until_told(address)
    if link is not None:
        await link.stop()
    await server.stop()


async def _worker(config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    spec = resolve_spec(config["preset"], block_size=config["block_size"])
    runtime = await asyncio.to_thread(ModelRuntime, ModelConfig(model=config["model"], spec=spec))
    server = WorkerServer(
        runtime,
        config=PrefillConfig()
        if config["role"] == "prefill"
        else DecodeConfig(kv_memory=KV_MEMORY, publish_answers=False),
        store_address=config["store"],
        store_cache_bytes=config["cache_bytes"],
    )
    await _until_told(await server.start())
    await server.stop(0.2)
    await asyncio.to_thread(runtime.close)


async def _until_told(address: str) -> None:
    """Says the address and waits for the end of standard input."""
    print(json.dumps({"address": address}), flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tune_malloc()
    given = json.loads(sys.argv[1])
    asyncio.run(_store(given) if given["role"] == "store" else _worker(given))
