"""A decode worker that leads a group of ranks: `python -m support.rank_worker MODEL BLOCK_SIZE RANKS [KIND]`; KIND is
tensor_parallel or context_parallel."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

import torch

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime, WorkerServer
from kvferry.kernels.spec import KVQuantSpec
from kvferry.kvstore.metrics_endpoint import MetricsPlace


async def serve(model: str, block_size: int, ranks: int, kind: str = "tensor_parallel") -> None:
    torch.set_num_threads(1)
    spec = KVQuantSpec(block_size=block_size)
    runtime = ModelRuntime(
        replace(ModelConfig(model=model, served_name="tiny", spec=spec, dtype="float32"), **{kind: ranks})
    )
    server = WorkerServer(
        runtime, config=DecodeConfig(kv_memory=32 * 2**20, metrics=MetricsPlace()), store_address=None
    )
    address = await server.start()
    print(f"followers {' '.join(map(str, runtime.executors.follower_pids))},", flush=True)
    print(f"metrics on {server.metrics_port},", flush=True)
    print(f"serving on {address},", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
