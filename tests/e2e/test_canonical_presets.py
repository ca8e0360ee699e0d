"""A cache hit never changes an answer, for every preset: same bytes and tokens cold, on a hit and recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kernels.presets import PRESETS
from kvferry.kernels.spec import KVQuantSpec, LayerSpec, TensorSpec
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.key import block_keys

NUM_BLOCKS = 2
BLOCK_SIZE = 128
PER_LAYER = KVQuantSpec(
    layer=PRESETS["kv2"].layer,
    overrides=((0, PRESETS["kv4"].layer), (2, LayerSpec(key=TensorSpec(bits=16), value=TensorSpec(bits=8)))),
    value_rotation="hadamard",
)
SPECS = {**PRESETS, "per-layer": PER_LAYER}
ORDINARY = ("kv2", "kv16", "per-layer")


@pytest.mark.parametrize(
    "name", [name if name in ORDINARY else pytest.param(name, marks=pytest.mark.deep) for name in SPECS]
)
async def test_same_bytes_and_tokens(
    name: str, load_runtime: Callable[..., ModelRuntime], serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    """The answer is long enough to fill a block during decode."""
    token_ids = make_prompt(NUM_BLOCKS * BLOCK_SIZE + 100)
    worker = load_runtime("llama", spec=SPECS[name])
    keys = block_keys(namespace_of(worker.identity, tenant="default", block_size=BLOCK_SIZE), token_ids)
    alone = await (await serve_workers(worker)).generate(token_ids, max_tokens=40)
    store = await make_store()
    cold = await (await serve_workers(worker, store.address)).generate(token_ids, max_tokens=40)
    records = await store.records(keys)
    assert all(record is not None for record in records)
    hit = await (await serve_workers(worker, store.address)).generate(token_ids, max_tokens=40)
    assert hit.num_cached_tokens == hit.usage.store_tokens_read == NUM_BLOCKS * BLOCK_SIZE
    await store.backend.delete(keys[1:])
    partial = await (await serve_workers(worker, store.address)).generate(token_ids, max_tokens=40)
    assert partial.num_cached_tokens == BLOCK_SIZE
    assert await store.records(keys) == records
    assert alone.tokens == cold.tokens == hit.tokens == partial.tokens
    worker.close()


def test_presets_do_not_share_blocks(load_runtime: Callable[..., ModelRuntime]) -> None:
    identities = []
    for spec in SPECS.values():
        runtime = load_runtime("llama", spec=spec)
        identities.append(runtime.identity.spec_digest)
        runtime.close()
    assert len(set(identities)) == len(SPECS)
