"""A node of a ring killed or stopped, with real processes and signals: misses and bounded waits, nothing else.

The bounds asserted are far above the configured ones: a busy machine is slow, a hang is endless.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from support.processes import NodeProcess

from kvferry.kvstore import (
    BlockNotFound,
    ClientConfig,
    Namespace,
    RingConfig,
    StoreClient,
    StoreRing,
    StoreUnavailable,
    block_keys,
)
from kvferry.kvstore.placement import run_keys
from kvferry.kvstore.ring_member import RingMember

MakeRecord = Callable[..., bytes]
LOOKUP_S = 1.0
HANG_S = 5.0
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@pytest.fixture
def chain(namespace: Namespace) -> list[bytes]:
    return block_keys(namespace, range(32 * 48))


@pytest.fixture
def nodes(start_node: Callable[..., NodeProcess]) -> list[NodeProcess]:
    return [start_node("--memory", "256MiB") for _ in range(3)]


def make_ring(nodes: Sequence[NodeProcess], replication: int) -> StoreRing:
    def client(address: str) -> StoreClient:
        return StoreClient(ClientConfig(address=address, lookup_timeout_s=LOOKUP_S, progress_timeout_s=LOOKUP_S))

    addresses = tuple(node.address for node in nodes)
    config = RingConfig(nodes=addresses, replication=replication, lookup_timeout_s=LOOKUP_S, put_timeout_s=2.0)
    return StoreRing(config, make_client=client)


async def fill(ring: StoreRing, chain: list[bytes], make_record: MakeRecord, size: int = 300_000) -> None:
    store = ring.of_chain(chain)
    for index, key in enumerate(chain):
        assert await store.put(key, make_record(key, num_bytes=size, block_index=index), timeout_s=20.0)


async def settle(ring: StoreRing) -> None:
    """Until every copy of what was put is stored: no put is left behind."""
    async with asyncio.timeout(20):
        while any(member.is_silent for member in ring.members):
            await asyncio.sleep(0.01)


def first_member(ring: StoreRing, chain: list[bytes], index: int) -> RingMember:
    """Who is asked first for a block."""
    run = run_keys(chain)[index]
    return ring.reading_order(run, ring.members_of(run))[0]


def process_of(nodes: Sequence[NodeProcess], member: RingMember) -> NodeProcess:
    return next(node for node in nodes if node.address == member.address)


def others_of(ring: StoreRing, member: RingMember) -> list[RingMember]:
    return [other for other in ring.members if other is not member]


def right(record: Any) -> bytes:
    assert bytes(record.payload) == hashlib.shake_128(record.header.key).digest(len(record.payload))
    key: bytes = record.header.key
    return key


@pytest.mark.parametrize("fault", ["kill", "stop"])
async def test_a_lost_node_costs_a_lookup_nothing_where_there_are_copies(
    fault: str, nodes: list[NodeProcess], namespace: Namespace, chain: list[bytes], make_record: MakeRecord
) -> None:
    async with make_ring(nodes, 2) as ring:
        await fill(ring, chain, make_record, size=1000)
        await settle(ring)
        lost = first_member(ring, chain, 20)
        process_of(nodes, lost).signal(SIGNALS[fault])
        started = time.monotonic()
        found = await ring.of_chain(chain).lookup(chain, lease_s=5.0)
        assert found.num_contiguous == len(chain)
        keys = [right(r) async for r in ring.of_chain(chain).get(chain, namespace=namespace.digest())]
        assert keys == chain
        assert time.monotonic() - started < HANG_S
        async with asyncio.timeout(HANG_S):
            while lost.is_up or not ring.counters.unanswered:  # the call that was left behind tells the breaker
                await asyncio.sleep(0.01)
        assert lost.client.counters.failures >= 1
        assert [other.client.counters.failures for other in others_of(ring, lost)] == [0, 0]
        await ring.of_chain(chain).release(found.lease_id)


@pytest.mark.parametrize("fault", ["kill", "stop"])
async def test_a_lost_node_without_copies_is_a_miss_and_others_take_its_share(
    fault: str, nodes: list[NodeProcess], namespace: Namespace, chain: list[bytes], make_record: MakeRecord
) -> None:
    async with make_ring(nodes, 1) as ring:
        await fill(ring, chain, make_record, size=1000)
        lost = first_member(ring, chain, 20)
        there = [first_member(ring, chain, index) is not lost for index in range(len(chain))]
        process_of(nodes, lost).signal(SIGNALS[fault])
        started = time.monotonic()
        try:
            found = (await ring.of_chain(chain).lookup(chain)).num_contiguous
        except StoreUnavailable:  # the lost one is the only node that could say anything of block 0 .. 20
            found = 0
        assert found == there.index(False)
        assert time.monotonic() - started < HANG_S
        assert ring.counters.unanswered == 1
        assert not lost.is_up
        stored = []
        for index, key in enumerate(chain):
            stored.append(await ring.of_chain(chain).put(key, make_record(key, block_index=index)))
        # What the lost one had is published again to the next nodes of the ranking; nothing else moved.
        assert stored == [not had for had in there]
        assert [right(r) async for r in ring.of_chain(chain).get(chain, namespace=namespace.digest())] == chain
        assert time.monotonic() - started < 2 * HANG_S
        if fault == "stop":
            process_of(nodes, lost).signal(signal.SIGCONT)
            async with asyncio.timeout(HANG_S):
                while not lost.is_up:
                    await asyncio.sleep(0.01)
            # Its share is its own again, with the records that it kept.
            assert [first_member(ring, chain, index) is not lost for index in range(len(chain))] == there
            assert [right(r) async for r in ring.of_chain(chain).get(chain, namespace=namespace.digest())] == chain


@pytest.mark.parametrize("fault", ["kill", "stop"])
@pytest.mark.parametrize("after", [17, 24, 34])
async def test_a_node_lost_while_it_sends_is_replaced_by_its_copies(
    fault: str,
    after: int,
    nodes: list[NodeProcess],
    namespace: Namespace,
    chain: list[bytes],
    make_record: MakeRecord,
) -> None:
    """Every record is still verified, in order, each once."""
    async with make_ring(nodes, 2) as ring:
        await fill(ring, chain, make_record, size=2_000_000)
        await settle(ring)
        lost = first_member(ring, chain, after)
        got = []
        started = 0.0
        async with aclosing(ring.of_chain(chain).get(chain, namespace=namespace.digest())) as records:
            async for record in records:
                got.append(right(record))
                if len(got) == after:
                    process_of(nodes, lost).signal(SIGNALS[fault])
                    started = time.monotonic()
        assert got == chain
        assert time.monotonic() - started < 2 * HANG_S
        assert ring.counters.failovers >= 1
        assert lost.client.counters.failures == 1


@pytest.mark.parametrize("fault", ["kill", "stop"])
async def test_without_copies_a_get_ends_where_the_lost_node_was(
    fault: str, nodes: list[NodeProcess], namespace: Namespace, chain: list[bytes], make_record: MakeRecord
) -> None:
    async with make_ring(nodes, 1) as ring:
        await fill(ring, chain, make_record, size=2_000_000)
        lost = first_member(ring, chain, 32)
        there = [first_member(ring, chain, index) is not lost for index in range(len(chain))]
        process_of(nodes, lost).signal(SIGNALS[fault])
        got = []
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            async for record in ring.of_chain(chain).get(chain, namespace=namespace.digest()):
                got.append(right(record))
        assert got == chain[: there.index(False)]
        assert time.monotonic() - started < HANG_S
        assert lost.client.counters.failures == 1
        with pytest.raises(BlockNotFound):  # from now on others answer for it: they do not have it
            async for record in ring.of_chain(chain).get(chain, namespace=namespace.digest()):
                right(record)


@pytest.mark.parametrize("fault", ["kill", "stop"])
@pytest.mark.parametrize("replication", [1, 2])
async def test_a_node_lost_while_records_are_put(
    fault: str,
    replication: int,
    nodes: list[NodeProcess],
    namespace: Namespace,
    chain: list[bytes],
    make_record: MakeRecord,
) -> None:
    async with make_ring(nodes, replication) as ring:
        store = ring.of_chain(chain)
        lost = first_member(ring, chain, 20)
        refused = 0
        started = 0.0
        for index, key in enumerate(chain):
            if index == 20:
                process_of(nodes, lost).signal(SIGNALS[fault])
                started = time.monotonic()
            try:
                assert await store.put(key, make_record(key, num_bytes=1_000_000, block_index=index))
            except StoreUnavailable:
                refused += 1
        # Without a copy, the first put to the lost node fails; the next ones go to the others.
        assert refused == (1 if replication == 1 else 0)
        assert time.monotonic() - started < 3 * HANG_S
        async with asyncio.timeout(HANG_S):
            while lost.is_up:
                await asyncio.sleep(0.01)
        assert lost.client.counters.failures >= 1
        if replication == 2:
            assert ring.counters.copies_lost >= 1
            assert [right(r) async for r in store.get(chain, namespace=namespace.digest())] == chain


async def test_a_stopped_node_holds_up_one_put_and_no_more(
    nodes: list[NodeProcess], chain: list[bytes], make_record: MakeRecord
) -> None:
    """While a put is left behind for it, it gets no other: memory is bounded, and nobody waits."""
    async with make_ring(nodes, 3) as ring:
        await fill(ring, chain[:1], make_record, size=1000)
        nodes[0].signal(signal.SIGSTOP)
        store = ring.of_chain(chain)
        for index in range(1, 9):
            assert await store.put(chain[index], make_record(chain[index], block_index=index), timeout_s=20.0)
        assert ring.counters.left_behind == 1
        assert ring.counters.copies_lost == 8
        stopped = next(member for member in ring.members if member.address == nodes[0].address)
        assert stopped.is_silent
        nodes[0].signal(signal.SIGCONT)
        await settle(ring)
        assert stopped.is_up
        # The copy that was left behind arrived; those that were not sent did not.
        assert (await stopped.client.lookup(chain[:2])).num_contiguous == 2
        assert (await stopped.client.lookup(chain[2:])).num_contiguous == 0


async def test_nodes_join_and_leave_under_load(
    start_node: Callable[..., NodeProcess],
    nodes: list[NodeProcess],
    namespace: Namespace,
    make_record: MakeRecord,
) -> None:
    """Readers and writers run on while nodes join, leave and die; whatever comes is verified, and nothing hangs."""
    chains = [block_keys(namespace, [number] * 32 * 20) for number in range(12)]
    errors: list[BaseException] = []
    reads = misses = 0
    stopping = asyncio.Event()

    async def use(ring: StoreRing, number: int) -> None:
        nonlocal reads, misses
        while not stopping.is_set():
            chain = chains[number % len(chains)]
            number += 5
            store = ring.of_chain(chain)
            got: list[bytes] = []
            try:
                found = await store.lookup(chain, lease_s=2.0)
                async with aclosing(
                    store.get(chain[: found.num_contiguous], namespace=namespace.digest(), lease_id=found.lease_id)
                    if found.num_contiguous
                    else _nothing()
                ) as records:
                    async for record in records:
                        got.append(right(record))
                if found.lease_id:
                    await store.release(found.lease_id)
            except (StoreUnavailable, BlockNotFound):
                misses += 1
            except BaseException as error:
                errors.append(error)
                raise
            assert got == chain[: len(got)]
            reads += len(got)
            for index in range(len(got), len(chain)):
                try:
                    await store.put(chain[index], make_record(chain[index], num_bytes=50_000, block_index=index))
                except StoreUnavailable:
                    misses += 1

    async with make_ring(nodes, 2) as ring:
        users = [asyncio.create_task(use(ring, number)) for number in range(4)]
        addresses = [node.address for node in nodes]
        fourth = await asyncio.to_thread(start_node)
        for step in range(6):
            await asyncio.sleep(0.7)
            if step == 1:
                nodes[0].kill()
            if step == 3:
                nodes[1].signal(signal.SIGSTOP)
            if step == 4:
                nodes[1].signal(signal.SIGCONT)
            ring.set_nodes([*addresses[:3], fourth.address] if step % 2 == 0 else addresses)
        ring.set_nodes([*addresses[1:], fourth.address])
        stopping.set()
        async with asyncio.timeout(30):
            await asyncio.gather(*users)
        assert not errors
        assert reads > 100  # the control: the store was in use
        assert ring.counters.unanswered + ring.counters.failovers + ring.counters.copies_lost > 0
        await settle(ring)
        for chain in chains:
            await asyncio.gather(
                *(ring.of_chain(chain).put(key, make_record(key, block_index=i)) for i, key in enumerate(chain))
            )
            assert (await ring.of_chain(chain).lookup(chain, timeout_s=10.0)).num_contiguous == len(chain)


async def _nothing() -> Any:
    return
    yield
