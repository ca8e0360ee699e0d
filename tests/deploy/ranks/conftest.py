"""Groups of ranks over a tiny model with four KV heads: real processes, gloo between them, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.rank_models import save_model

from kvferry.deploy.worker_server import ModelConfig, ModelRuntime
from kvferry.kernels.spec import KVQuantSpec

BLOCK_SIZE = 32
SPEC = KVQuantSpec(block_size=BLOCK_SIZE, value_rotation="hadamard")


@pytest.fixture(scope="session")
def rank_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model of a family, with 8 query heads and 4 KV heads."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save_model(family, tmp_path_factory.mktemp(f"ranks-{family}"))
        return made[family]

    return make


@pytest.fixture(scope="session")
def group(rank_model: Callable[[str], Path]) -> Iterator[Callable[..., ModelRuntime]]:
    """The runtime of a worker of so many ranks, which this process leads; kept for the session."""
    started: dict[tuple[str, int, KVQuantSpec], ModelRuntime] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def start(size: int, family: str = "llama", spec: KVQuantSpec = SPEC) -> ModelRuntime:
        if (family, size, spec) not in started:
            config = ModelConfig(model=str(rank_model(family)), dtype="float32", spec=spec, tensor_parallel=size)
            started[family, size, spec] = ModelRuntime(config, on_ranks_lost=pytest.fail)
        return started[family, size, spec]

    yield start
    for runtime in started.values():
        runtime.close()
    torch.set_num_threads(threads)
