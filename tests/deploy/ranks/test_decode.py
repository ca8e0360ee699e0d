"""Decode by a group, behind a store: mixed sizes, what the store holds, and one rank that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import torch

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.ranks.decode import GroupDecode
from kvferry.deploy.ranks.errors import RankFailed
from kvferry.deploy.spec_file import resolve_spec
from kvferry.deploy.worker_server import ModelRuntime, WorkerServer
from kvferry.kvstore.codec import decode_record
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.key import block_keys
from kvferry.prefill.config import PrefillConfig
from kvferry.proto import worker_pb2, worker_pb2_grpc

BLOCK_SIZE = 32
NUM_BLOCKS = 6
MAX_TOKENS = 40
"""More than a block: decode packs one itself."""

PATIENT = PrefillConfig(fetch="always", lookup_timeout_s=10.0)
"""So many processes on few cores may take longer than the default for a look-up."""
SIZES = [(2, 1), (1, 2), *(pytest.param(*sizes, marks=pytest.mark.deep) for sizes in ((2, 4), (2, 8)))]

Group = Callable[..., ModelRuntime]


def small_pool(num_blocks: int, runtime: ModelRuntime, *, size: int) -> DecodeConfig:
    shard = runtime.rank.shard_layout
    return DecodeConfig(kv_memory=num_blocks * shard.block_bytes * size, max_num_seqs=4, publish_answers=False)


@pytest.mark.parametrize(("prefill", "decode"), SIZES)
async def test_any_prefill_group_feeds_any_decode_group(
    prefill: int, decode: int, group: Group, serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    """Cold, hit and partial hit give the same tokens, and here also those of one rank."""
    maker, reader, store = group(prefill), group(decode), await make_store()
    token_ids = make_prompt(NUM_BLOCKS * BLOCK_SIZE + 9)
    alone = await (await serve_workers(group(1))).generate(token_ids, max_tokens=MAX_TOKENS)
    workers = await serve_workers(maker, store.address, decode_runtime=reader, prefill_config=PATIENT)
    cold = await workers.generate(token_ids, max_tokens=MAX_TOKENS)
    assert (cold.num_cached_tokens, len(cold.tokens)) == (0, MAX_TOKENS)
    assert cold.tokens == alone.tokens

    namespace = namespace_of(maker.identity, tenant="default", block_size=BLOCK_SIZE)
    keys = block_keys(namespace, token_ids)
    records = await store.records(keys)
    for index, (key, record) in enumerate(zip(keys, records, strict=True)):
        found = decode_record(record, expected_key=key, expected_namespace=namespace.digest())
        assert len(found.payload) == maker.layout.payload_bytes(index)  # whole, whatever the group

    fresh = await serve_workers(maker, store.address, decode_runtime=reader, prefill_config=PATIENT)
    hit = await fresh.generate(token_ids, max_tokens=MAX_TOKENS)
    assert (hit.num_cached_tokens, hit.tokens) == (NUM_BLOCKS * BLOCK_SIZE, cold.tokens)
    fresh = await serve_workers(maker, store.address, decode_runtime=reader, prefill_config=PATIENT)
    await store.backend.delete(keys[3:])
    partial = await fresh.generate(token_ids, max_tokens=MAX_TOKENS)
    assert (partial.num_cached_tokens, partial.tokens) == (3 * BLOCK_SIZE, cold.tokens)


async def test_blocks_without_sinks(group: Group, serve_workers: Any, make_store: Any, make_prompt: Any) -> None:
    """`kv16` has none: what the ranks get of them is empty."""
    spec = resolve_spec("kv16", block_size=BLOCK_SIZE)
    maker, reader, store = group(1, spec=spec), group(2, spec=spec), await make_store()
    token_ids = make_prompt(2 * BLOCK_SIZE + 9)
    cold = await (await serve_workers(maker, store.address)).generate(token_ids)
    hit = await (await serve_workers(maker, store.address, decode_runtime=reader, prefill_config=PATIENT)).generate(
        token_ids
    )
    assert (hit.num_cached_tokens, hit.tokens) == (2 * BLOCK_SIZE, cold.tokens)


async def test_groups_of_different_sizes_share_no_block(
    group: Group, serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    store, token_ids = await make_store(), make_prompt(4 * BLOCK_SIZE + 3, seed=4)  # nobody else's
    for size in (1, 2):
        workers = await serve_workers(group(size), store.address, decode_runtime=group(1), prefill_config=PATIENT)
        assert (await workers.generate(token_ids)).num_cached_tokens == 0


async def test_several_answers_that_displace_each_other(group: Group, serve_workers: Any, make_prompt: Any) -> None:
    """Every rank swaps its shard out and in, and copies slots: the tokens are those of a large pool."""
    runtime = group(2)
    prompts = [make_prompt(2 * BLOCK_SIZE + 5, seed=seed) for seed in range(3)]
    roomy = await serve_workers(runtime)
    wanted = [await roomy.generate(prompt, max_tokens=70) for prompt in prompts]
    tight = await serve_workers(runtime, None, small_pool(9, runtime, size=2))
    answers = await asyncio.gather(*(tight.generate(prompt, max_tokens=70) for prompt in prompts))
    assert [a.tokens for a in answers] == [a.tokens for a in wanted]
    assert tight.decode_server.stats().decode.num_swaps > 0
    both = [chunk async for chunk in roomy.stream(prompts[0], max_tokens=20, n=2, temperature=1.0, seed=5)]
    assert {chunk.choice for chunk in both} == {0, 1}


def test_a_tail_that_another_rank_cannot_pack(group: Group) -> None:
    """Its heads only: the leader's are sound. All ranks hear of it, and the group goes on."""
    runtime = group(2)
    executor = runtime.executors.decode(num_blocks=2, num_slots=1)
    assert isinstance(executor, GroupDecode)
    layers, two, heads, _, dim = runtime.layout.tail_shape
    tail = torch.randn(layers, two, heads, BLOCK_SIZE - 1, dim).half()
    executor.memory.load_tail(0, tail.numpy().tobytes())
    executor.pack_tail(0, 0, index=0)
    tail[0, 0, heads - 1, 5, 7] = torch.nan
    executor.memory.load_tail(0, tail.numpy().tobytes())
    with pytest.raises(RankFailed, match="another rank"):
        executor.pack_tail(0, 1, index=1)
    executor.memory.load_tail(0, tail.nan_to_num().numpy().tobytes())
    executor.pack_tail(0, 1, index=1)


async def test_both_roles_of_one_group(group: Group, serve_workers: Any, make_prompt: Any) -> None:
    """Prefill passes and decode steps of one group take turns: their collectives never mix."""
    runtime = group(2)
    prompts = [make_prompt(3 * BLOCK_SIZE + 7, seed=seed) for seed in range(4)]
    apart = await serve_workers(runtime)
    wanted = [(await apart.generate(prompt, max_tokens=MAX_TOKENS)).tokens for prompt in prompts]
    config = DecodeConfig(kv_memory=32 * 2**20, publish_answers=False)
    server = WorkerServer(runtime, config=config, store_address=None, own_prefill=PrefillConfig())
    address = await server.start()

    async def ask(channel: grpc.aio.Channel, prompt: list[int]) -> list[int]:
        request = worker_pb2.DecodeRequest(
            request_id="both",
            tenant="default",
            token_ids=prompt,
            sampling=worker_pb2.SamplingParams(max_tokens=MAX_TOKENS),
        )
        answer = worker_pb2_grpc.DecodeStub(channel).Generate(request, timeout=120)
        return [chunk.token_id async for chunk in answer]

    try:
        async with grpc.aio.insecure_channel(address) as channel:
            assert await asyncio.gather(*(ask(channel, prompt) for prompt in prompts)) == wanted
    finally:
        await server.stop(0.2)
