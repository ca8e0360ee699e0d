"""Prefill and decode worker and gateway in one process beside a store node: `python -m support.serving MODEL STORE`.

What `kvferry serve` starts, without Ray: for tests that need several deployments.
"""

from __future__ import annotations

import asyncio
import sys

import torch

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.assembly import make_gateway
from kvferry.deploy.settings import GatewaySettings, Settings
from kvferry.deploy.spec_file import resolve_spec
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime, WorkerServer
from kvferry.prefill.config import PrefillConfig

PRESET = "kv3"
BLOCK_SIZE = 64


async def serve(model: str, store_address: str) -> None:
    torch.set_num_threads(1)
    spec = resolve_spec(PRESET, block_size=BLOCK_SIZE)
    runtime = ModelRuntime(ModelConfig(model=model, served_name="tiny", spec=spec, dtype="float32"))
    prefill = WorkerServer(runtime, config=PrefillConfig(fetch="always"), store_address=store_address)
    decode = WorkerServer(runtime, config=DecodeConfig(kv_memory=32 * 2**20), store_address=store_address)
    prefill_address, decode_address = await prefill.start(), await decode.start()
    settings = Settings(model=model, served_model_name="tiny", gateway=GatewaySettings(port=0))
    gateway = await make_gateway(settings, prefill=[prefill_address], decode=[decode_address])
    port = await gateway.start()
    await gateway.wait_until_serving(60)
    print(f"worker on {prefill_address}", flush=True)
    print(f"gateway on 127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2]))
