"""Every bit of a block flipped, the block cut at every length, a genuine block under another one's key: never used."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from support.fault_relay import FaultRelay
from support.store_processes import NAMESPACE, key_of, record_of
from support.store_requests import BLOCK_SIZE, IS_DEEP, NUM_BLOCKS, Requests, store_client

from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.reference import quantize_pages
from kvferry.kernels.spec import KVQuantSpec
from kvferry.kvstore import BlockCorrupt, BlockNotFound
from kvferry.kvstore.codec import decode_moved_record, decode_record, encode_record, verify_record
from kvferry.kvstore.config import NodeConfig
from kvferry.kvstore.disk_backend import DiskBackend
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.server import KVStoreServer

KEY = hashlib.sha256(b"block").digest()


@pytest.fixture(scope="module")
def block_record() -> bytes:
    """A small but genuine one: block 0 of one layer and one head, with sinks."""
    layout = BlockLayout(num_layers=1, num_kv_heads=1, head_dim=16, spec=KVQuantSpec(block_size=32))
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 32, 16, generator=generator).half()
    pages = quantize_pages(keys, values, layout.layers[0].page).reshape(-1)
    payload = layout.join_payload(pages, torch.randn(layout.sink_shape, generator=generator).half())
    return encode_record(
        key=KEY, namespace=NAMESPACE, block_index=0, num_tokens=32, payload=[payload.numpy().tobytes()]
    )


def damages(record: bytes, *, step: int) -> Iterator[bytes]:
    """The record with one bit flipped, at every `step`th bit; then cut, at every `step`th length."""
    for bit in range(0, 8 * len(record), step):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << (bit % 8)
        yield bytes(damaged)
    for length in range(0, len(record), step):
        yield record[:length]


def test_every_bit_and_every_length(block_record: bytes) -> None:
    """What the node checks, what bundles check and what the worker checks: each of them finds all of it alone."""
    assert decode_record(block_record, expected_key=KEY, expected_namespace=NAMESPACE).header.num_tokens == 32
    num_refused = 0
    for damaged in damages(block_record, step=1):
        with pytest.raises(BlockCorrupt):
            verify_record(damaged, KEY)
        with pytest.raises(BlockCorrupt):
            decode_record(damaged, expected_key=KEY, expected_namespace=NAMESPACE)
        with pytest.raises(BlockCorrupt):
            decode_moved_record(damaged, expected_key=KEY, expected_namespace=NAMESPACE)
        num_refused += 1
    assert num_refused == 9 * len(block_record) > 6000


@pytest.fixture
async def poked() -> AsyncIterator[tuple[KVStoreServer, MemoryBackend]]:
    """A node whose memory is damaged by hand: it does not check what it holds in memory, so the client must."""
    backend = MemoryBackend(capacity_bytes=64 << 20)
    server = KVStoreServer(backend, NodeConfig())
    await server.start()
    yield server, backend
    await server.stop(0.2)


async def poke(backend: MemoryBackend, key: bytes, record: bytes) -> None:
    await backend.delete([key])
    await backend.put(key, record)


@pytest.mark.timeout(1800 if IS_DEEP else 300)
@pytest.mark.parametrize("is_bulk", [True, False], ids=["bulk", "grpc"])
async def test_damage_in_the_nodes_memory_does_not_pass_the_client(
    is_bulk: bool, block_record: bytes, poked: tuple[KVStoreServer, MemoryBackend]
) -> None:
    server, backend = poked
    num_refused = 0
    async with store_client(server.address, use_bulk=is_bulk) as client:
        for damaged in damages(block_record, step=1 if IS_DEEP else 61):
            await poke(backend, KEY, damaged)
            with pytest.raises((BlockCorrupt, BlockNotFound)):
                await anext(client.get([KEY], namespace=NAMESPACE))
            num_refused += 1
            assert not backend.holds(KEY), "refused, and deleted"
        assert client.counters.corrupt + server.counters.corrupt == num_refused > 100
        assert (client.counters.bulk_gets, client.counters.bulk_fallbacks) == ((num_refused, 0) if is_bulk else (0, 0))
        await poke(backend, KEY, block_record)
        assert (await anext(client.get([KEY], namespace=NAMESPACE))).header.key == KEY, "the control"


async def test_blocks_under_each_others_keys_do_not_pass(
    poked: tuple[KVStoreServer, MemoryBackend], tmp_path: Path
) -> None:
    """Every pair of eight, in memory; and files of the disk tier renamed into each other's places."""
    server, backend = poked
    pairs = [(one, other) for one in range(8) for other in range(8) if one != other]
    async with store_client(server.address) as client:
        for one, other in pairs:
            await poke(backend, key_of(one), record_of(other))
            with pytest.raises(BlockCorrupt, match="another block key"):
                await anext(client.get([key_of(one)], namespace=NAMESPACE))
            assert not backend.holds(key_of(one))
        assert client.counters.corrupt == len(pairs)
    disk = DiskBackend(tmp_path / "disk", capacity_bytes=64 << 20)
    for number in range(8):
        await disk.put(key_of(number), record_of(number))
    await disk.close()
    files = sorted((tmp_path / "disk" / "records").glob("*/*"))
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    disk = DiskBackend(tmp_path / "disk", capacity_bytes=64 << 20)
    server = KVStoreServer(disk, NodeConfig())
    await server.start()
    async with store_client(server.address) as client:
        for number in range(8):
            with pytest.raises((BlockCorrupt, BlockNotFound)):
                await anext(client.get([key_of(number)], namespace=NAMESPACE))
        stats = await client.stats()
        assert (stats.corrupt, stats.records) == (8, 0)
    await server.stop(0.2)


@pytest.mark.timeout(1800 if IS_DEEP else 300)
@pytest.mark.parametrize("damage", ["flip", "cut", "swap"])
async def test_a_request_never_uses_a_damaged_block(
    damage: str, relay: FaultRelay, requests: Requests, poked: tuple[KVStoreServer, MemoryBackend]
) -> None:
    """One block of the prefix is damaged: those before it are used, the rest is computed, to the same bytes."""
    server, backend = poked
    relay.target = server.address
    await requests.ask()
    genuine = await backend.get(requests.keys)
    assert None not in genuine
    rng = random.Random(7)
    places = list(range(NUM_BLOCKS)) * 5 if IS_DEEP else [0, 1, 6, NUM_BLOCKS - 1]
    for number, place in enumerate(places):
        record = genuine[place]
        assert record is not None
        if damage == "flip":
            bit = rng.randrange(8 * len(record))
            damaged = bytearray(record)
            damaged[bit // 8] ^= 1 << (bit % 8)
        elif damage == "cut":
            damaged = bytearray(record[: rng.randrange(1, len(record))])
        else:
            damaged = bytearray(genuine[(place + rng.randrange(1, NUM_BLOCKS)) % NUM_BLOCKS] or b"")
        await poke(backend, requests.keys[place], bytes(damaged))
        answer = await requests.ask()
        assert answer.num_cached_tokens == place * BLOCK_SIZE
        assert requests.num_corrupt == number + 1, "the control: it was met, once"
        assert await backend.get(requests.keys) == genuine
    assert (await requests.ask()).num_cached_tokens == NUM_BLOCKS * BLOCK_SIZE
