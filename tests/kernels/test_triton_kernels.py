"""The Triton kernels against the reference: in Triton's interpreter everywhere, and compiled where there is a GPU.

The interpreted checks run in processes of their own, each case reported as a test here: `support.triton_cases`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.triton_cases import (
    CASES,
    INTERPRETED_CASES,
    LAYER,
    SHARDS,
    make_batch,
    make_layout,
    make_query,
    on_device,
    triton_kernels,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """Each case's error, from the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(str(root / folder) for folder in ("src", "tests")),
    }
    shards = [
        subprocess.Popen(
            [sys.executable, "-m", "support.triton_cases", str(shard)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for shard in range(SHARDS)
    ]
    results: dict[str, str | None] = {}
    for shard in shards:
        stdout, stderr = shard.communicate()
        assert shard.returncode == 0, stderr
        results |= dict(json.loads(line) for line in stdout.splitlines())
    return results


@pytest.mark.parametrize("case", INTERPRETED_CASES)
def test_interpreted(case: str, interpreted: dict[str, str | None]) -> None:
    error = interpreted[case]
    if error is not None:
        pytest.fail(error, pytrace=False)


on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and no TRITON_INTERPRET")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("case", CASES)
def test_compiled(case: str) -> None:
    CASES[case](torch.device("cuda"))


@pytest.mark.gpu
@on_gpu
def test_decode_replays_in_a_cuda_graph() -> None:
    """One capture serves every context that fits the block table."""
    device = torch.device("cuda")
    layout = make_layout(128, 2)
    first = on_device(make_batch(layout, [([3, 1], 7), ([0, 2], 2)]), device)
    query = make_query(first, 4).to(device)
    kernels = triton_kernels()
    kernels.decode_attention(query, first, layer=LAYER, scale=0.1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.decode_attention(query, first, layer=LAYER, scale=0.1)
    for blocks, tails in (([2, 2], [7, 2]), ([1, 0], [3, 1])):
        first.num_blocks.copy_(torch.tensor(blocks))
        first.tail_lens.copy_(torch.tensor(tails))
        graph.replay()
        wanted = kernels.decode_attention(query, first, layer=LAYER, scale=0.1)
        assert torch.equal(captured, wanted)
