"""A prefill worker in a process of its own: `python -m support.prefill_worker MODEL BLOCK_SIZE THREADS [STORE]`."""

from __future__ import annotations

import asyncio
import sys

import torch

from kvferry.deploy.worker_server import ModelConfig, ModelRuntime, WorkerServer
from kvferry.kernels.spec import KVQuantSpec
from kvferry.prefill.config import PrefillConfig


async def serve(model: str, block_size: int, threads: int, store_address: str | None) -> None:
    torch.set_num_threads(threads)
    runtime = ModelRuntime(ModelConfig(model=model, spec=KVQuantSpec(block_size=block_size), dtype="float32"))
    server = WorkerServer(runtime, config=PrefillConfig(fetch="always"), store_address=store_address)
    print(f"serving on {await server.start()},", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None))
