"""Bundles and chains to and from real nodes, interrupted and repeated."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.bundles import payload_of, record_of, small_chain, write_bundle

from kvferry.kvstore import ClientConfig, KVStoreServer, MemoryBackend, StoreClient
from kvferry.kvstore.bundle_chain import Chain
from kvferry.kvstore.bundle_errors import BundleDamaged
from kvferry.kvstore.bundle_reader import BundleReader
from kvferry.kvstore.bundle_transfer import (
    copy_chain,
    export_chain,
    import_bundle,
    num_stored,
    wait_until_stored,
)
from kvferry.kvstore.bundle_writer import BundleWriter
from kvferry.kvstore.codec import decode_record
from kvferry.kvstore.errors import BlockNotFound, StoreFull, StoreUnavailable

CHAIN = small_chain(70)  # over two windows


class Seen(list[int]):
    """A progress that remembers, and can end the transfer."""

    def __init__(self, fail_at: int = -1) -> None:
        self._fail_at = fail_at

    def __call__(self, num_done: int) -> None:
        self.append(num_done)
        if num_done == self._fail_at:
            raise KeyboardInterrupt


async def fill(client: StoreClient, chain: Chain, num_blocks: int | None = None) -> None:
    for index in range(len(chain.keys) if num_blocks is None else num_blocks):
        assert await client.put(chain.keys[index], record_of(chain, index))


async def other_client(start_node: Callable[..., Any], *arguments: str) -> StoreClient:
    return StoreClient(ClientConfig(address=start_node(*arguments).address, lookup_timeout_s=5.0))


async def test_export_import_is_the_same_records(
    client: StoreClient, start_node: Callable[..., Any], tmp_path: Path
) -> None:
    """The node that exports has every backend, the one that imports is another process."""
    await fill(client, CHAIN)
    path, seen = tmp_path / "x", Seen()
    with BundleWriter(path, CHAIN) as writer:
        await export_chain(client, writer, CHAIN, seen)
        writer.finish()
    assert seen == list(range(71))
    assert path.read_bytes() == write_bundle(tmp_path / "y", CHAIN).read_bytes()
    async with await other_client(start_node) as other:
        with BundleReader(path) as bundle:
            done = await import_bundle(bundle, other, Seen())
            assert (done.num_sent, done.num_present) == (70, 0)
            assert done.bytes_sent == sum(row.nbytes for row in bundle.header.rows)
            again = await import_bundle(bundle, other, Seen())
            assert (again.num_sent, again.num_present, again.bytes_sent) == (0, 70, 0)
        index = 0
        async for record in other.get(CHAIN.keys, namespace=CHAIN.namespace.digest()):
            assert bytes(record.payload) == payload_of(CHAIN, index)
            index += 1
        assert index == 70


async def test_an_interrupted_export_goes_on(client: StoreClient, tmp_path: Path) -> None:
    await fill(client, CHAIN)
    path, seen = tmp_path / "x", Seen()
    with BundleWriter(path, CHAIN) as writer, pytest.raises(KeyboardInterrupt):
        await export_chain(client, writer, CHAIN, Seen(fail_at=40))
    before = (await client.stats()).hits
    with BundleWriter(path, CHAIN) as writer:
        await export_chain(client, writer, CHAIN, seen)
        writer.finish()
    assert seen == list(range(40, 71))
    assert (await client.stats()).hits - before == 30
    assert path.read_bytes() == write_bundle(tmp_path / "y", CHAIN).read_bytes()


async def test_an_export_without_the_blocks_says_so_and_leaves_nothing(client: StoreClient, tmp_path: Path) -> None:
    await fill(client, CHAIN, 50)
    with (
        BundleWriter(tmp_path / "x", CHAIN) as writer,
        pytest.raises(BlockNotFound, match="block 50 of the prefix's 70") as caught,
    ):
        await export_chain(client, writer, CHAIN, Seen())
    assert caught.value.index == 50
    assert os.listdir(tmp_path) == []


async def test_blocks_lost_in_the_middle_of_an_export(client: StoreClient, tmp_path: Path) -> None:
    """What came is kept; when the blocks are back, the export goes on."""
    await fill(client, CHAIN)

    with BundleWriter(tmp_path / "x", CHAIN) as writer:
        with pytest.raises(KeyboardInterrupt):
            await export_chain(client, writer, CHAIN, Seen(fail_at=32))
        await client.delete(CHAIN.keys[:60])
        with pytest.raises(BlockNotFound, match="block 32 "):
            await export_chain(client, writer, CHAIN, Seen())
        for index in range(32, 60):
            await client.put(CHAIN.keys[index], record_of(CHAIN, index))
        await export_chain(client, writer, CHAIN, Seen())
        writer.finish()
    assert (tmp_path / "x").read_bytes() == write_bundle(tmp_path / "y", CHAIN).read_bytes()


async def test_an_interrupted_import_goes_on(client: StoreClient, tmp_path: Path) -> None:
    with BundleReader(write_bundle(tmp_path / "x", CHAIN)) as bundle:
        with pytest.raises(KeyboardInterrupt):
            await import_bundle(bundle, client, Seen(fail_at=33))
        assert await num_stored(client, CHAIN) == 33  # usable at once
        await client.delete(CHAIN.keys[10:11])  # and one of them was evicted
        done = await import_bundle(bundle, client, Seen())
    assert (done.num_sent, done.num_present) == (38, 32)
    assert await num_stored(client, CHAIN) == 70


async def test_a_damaged_record_ends_an_import_before_it_is_stored(client: StoreClient, tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "x", CHAIN)
    with BundleReader(path) as bundle:
        content = bytearray(path.read_bytes())
        content[bundle.header.rows[5].offset + 150] ^= 4
        path.write_bytes(content)
    with BundleReader(path) as bundle, pytest.raises(BundleDamaged, match="record 5"):
        await import_bundle(bundle, client, Seen())
    assert await num_stored(client, CHAIN) == 5


async def test_another_tenants_records_have_their_own_keys_and_the_same_payloads(
    client: StoreClient, tmp_path: Path
) -> None:
    target = CHAIN.under_tenant("another")
    with BundleReader(write_bundle(tmp_path / "x", CHAIN)) as bundle:
        done = await import_bundle(bundle, client, Seen(), target=target)
    assert done.num_sent == 70
    assert await num_stored(client, CHAIN) == 0
    index = 0
    async for record in client.get(target.keys, namespace=target.namespace.digest()):
        assert bytes(record.payload) == payload_of(CHAIN, index)
        assert (record.header.key, record.header.block_index) == (target.keys[index], index)
        index += 1
    assert index == 70


async def test_a_node_that_is_too_small_is_not_a_success(start_node: Callable[..., Any], tmp_path: Path) -> None:
    async with await other_client(start_node, "--memory", "20000") as small:
        with (
            BundleReader(write_bundle(tmp_path / "x", CHAIN)) as bundle,
            pytest.raises(StoreFull, match=r"kept only the first \d+ of 70 blocks: give it more memory"),
        ):
            await import_bundle(bundle, small, Seen())


async def test_copy_between_nodes_goes_on_where_it_ended(client: StoreClient, start_node: Callable[..., Any]) -> None:
    await fill(client, CHAIN)
    async with await other_client(start_node) as other:
        with pytest.raises(KeyboardInterrupt):
            await copy_chain(client, other, CHAIN, Seen(fail_at=45))
        seen = Seen()
        done = await copy_chain(client, other, CHAIN, seen)
        assert (done.num_sent, done.num_present) == (25, 45)
        assert seen == list(range(45, 71))
        async for record in other.get(CHAIN.keys[60:61], namespace=CHAIN.namespace.digest()):
            assert bytes(record.payload) == payload_of(CHAIN, 60)
        with pytest.raises(BlockNotFound):
            await copy_chain(other, client, small_chain(3, first_token=77), Seen())


async def test_a_node_that_dies_ends_a_copy_with_a_typed_error(
    client: StoreClient, start_node: Callable[..., Any]
) -> None:
    await fill(client, CHAIN)
    node = start_node()
    async with StoreClient(ClientConfig(address=node.address, lookup_timeout_s=5.0)) as other:

        class Killing(Seen):
            def __call__(self, num_done: int) -> None:
                if num_done == 20:
                    node.kill()

        with pytest.raises(StoreUnavailable):
            await copy_chain(client, other, CHAIN, Killing())


async def test_memory_of_a_transfer_does_not_grow_with_the_chain(tmp_path: Path) -> None:
    """64 records of 1 MB through file and nodes: what Python allocates stays at a few of them."""
    chain = small_chain(64)
    source, target = (KVStoreServer(MemoryBackend(capacity_bytes=256 << 20)) for _ in range(2))
    await source.start()
    await target.start()
    try:
        async with (
            StoreClient(ClientConfig(address=source.address, lookup_timeout_s=5.0)) as client,
            StoreClient(ClientConfig(address=target.address, lookup_timeout_s=5.0)) as other,
        ):
            path = write_bundle(tmp_path / "x", chain, num_bytes=1_000_000)
            with BundleReader(path) as bundle:
                await import_bundle(bundle, client, Seen())
            path.unlink()
            tracemalloc.start()
            try:
                with BundleWriter(path, chain) as writer:
                    await export_chain(client, writer, chain, Seen())
                    writer.finish()
                with BundleReader(path) as bundle:
                    assert sum(record.nbytes for record in bundle.records()) > 64_000_000
                assert tracemalloc.get_traced_memory()[1] < 24_000_000
            finally:
                tracemalloc.stop()
            assert (await copy_chain(client, other, chain, Seen())).num_sent == 64
    finally:
        await source.stop(0)
        await target.stop(0)


async def test_waiting_for_what_is_still_published_is_bounded(client: StoreClient) -> None:
    await fill(client, CHAIN, 3)
    assert await wait_until_stored(client, CHAIN, timeout_s=0.3) == 3
    assert await wait_until_stored(client, small_chain(3), timeout_s=0.0) == 3


def test_the_stores_own_check_takes_a_bundles_record(tmp_path: Path) -> None:
    with BundleReader(write_bundle(tmp_path / "x", CHAIN)) as bundle:
        raw = bundle.raw_record(3)
    record = decode_record(raw, expected_key=CHAIN.keys[3], expected_namespace=CHAIN.namespace.digest())
    assert record.header.block_index == 3
