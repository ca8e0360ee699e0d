"""Blocks that reach decode while prefill computes them are those of the store, whatever happens to their pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
import torch
from support.decode_calls import Inside

from kvferry.decode.prefill_stream import RemotePrefillStream
from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kvstore.codec import decode_record
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.key import Namespace, block_keys
from kvferry.prefill.pieces import Piece, PieceQueue, Seal
from kvferry.proto import worker_pb2, worker_pb2_grpc

BLOCK_SIZE = 32
NUM_BLOCKS = 7
PROMPT_TOKENS = NUM_BLOCKS * BLOCK_SIZE + 9
LIMIT_S = 40.0


def namespace_for(worker: ModelRuntime) -> Namespace:
    return namespace_of(worker.identity, tenant="default", block_size=BLOCK_SIZE)


class WatchedStream(RemotePrefillStream):
    """Counts events by kind; `damage` changes some before decode sees them, or drops them (None)."""

    kinds: list[str]
    damage: Callable[[worker_pb2.PrefillEvent], worker_pb2.PrefillEvent | None]

    async def events(self) -> AsyncIterator[worker_pb2.PrefillEvent]:
        async for event in super().events():
            self.kinds.append(str(event.WhichOneof("event")))
            changed = self.damage(event)
            if changed is not None:
                yield changed


def watch(
    workers: Any, damage: Callable[[worker_pb2.PrefillEvent], worker_pb2.PrefillEvent | None] = lambda event: event
) -> list[str]:
    """The kinds of all events from now on."""
    kinds: list[str] = []
    stream = type("Stream", (WatchedStream,), {"kinds": kinds, "damage": staticmethod(damage)})
    workers.decode_server._decode[1]._remote_prefill = stream
    return kinds


@pytest.mark.parametrize("family", ["llama", "gemma2"])
async def test_the_pool_holds_the_bytes_of_the_records(
    family: str, runtime: Callable[[str], ModelRuntime], serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    """gemma2: half of the layers have a window, so its blocks lie in pool and ring."""
    worker, token_ids = runtime(family), make_prompt(PROMPT_TOKENS)
    store = await make_store()
    workers = await serve_workers(worker, store.address)
    kinds = watch(workers)
    answer = await workers.generate(token_ids)
    assert kinds.count("seal") == NUM_BLOCKS + 1
    assert "pieces" in kinds
    assert not {"block_ready", "block", "tail_chunk"} & set(kinds)
    assert kinds.index("pieces") < kinds.index("handoff")
    assert answer.usage.store_tokens_read == 0
    assert answer.usage.handoff_tokens == PROMPT_TOKENS
    layout, namespace = worker.layout, namespace_for(worker)
    payload_bytes = sum(layout.payload_bytes(index) for index in range(NUM_BLOCKS))
    assert answer.usage.handoff_bytes == payload_bytes + 9 * layout.bytes_per_token_bf16
    inside = Inside.of(workers)
    keys = block_keys(namespace, token_ids)
    for index, (key, record) in enumerate(zip(keys, await store.records(keys), strict=True)):
        block_id = inside.admission.pool.share(key)
        assert block_id is not None
        verified = decode_record(record, expected_key=key, expected_namespace=namespace.digest())
        block, sinks = layout.split_payload(torch.frombuffer(bytearray(verified.payload), dtype=torch.uint8), index)
        assert torch.equal(inside.cache.pool[block_id], layout.share(block, inside.cache.pool_layout))
        if sinks is not None:
            assert torch.equal(inside.cache.sinks_of(block_id), sinks)
        if inside.cache.in_ring(index, NUM_BLOCKS):
            ring = inside.cache.rings[:, index % inside.cache.ring_blocks]
            wanted = layout.share(block, inside.cache.rings_layout)
            assert any(torch.equal(slot, wanted) for slot in ring)
        inside.admission.pool.release([block_id])
    await inside.assert_all_free()


def each_piece(change: Callable[[worker_pb2.BlockPiece], None]) -> Any:
    """Changes one piece of block 3, the first that comes."""
    done: list[int] = []

    def damage(event: worker_pb2.PrefillEvent) -> worker_pb2.PrefillEvent:
        for piece in event.pieces.pieces:
            if piece.index == 3 and not done:
                done.append(1)
                change(piece)
        return event

    return damage


def flip(piece: worker_pb2.BlockPiece) -> None:
    piece.data = piece.data[:-1] + bytes([piece.data[-1] ^ 0x10])


def shift(piece: worker_pb2.BlockPiece) -> None:
    piece.offset += 1


def other_seal(event: worker_pb2.PrefillEvent) -> worker_pb2.PrefillEvent:
    if event.seal.index == 3:
        event.seal.checksum = bytes(32)
    return event


@pytest.mark.parametrize("damage", [each_piece(flip), each_piece(shift), other_seal], ids=["bit", "offset", "seal"])
async def test_a_damaged_block_is_asked_for_again(
    damage: Any, runtime: Callable[[str], ModelRuntime], serve_workers: Any, make_store: Any, make_prompt: Any
) -> None:
    worker, token_ids = runtime("llama"), make_prompt(PROMPT_TOKENS)
    oracle = (await (await serve_workers(worker)).generate(token_ids)).tokens
    store = await make_store()
    workers = await serve_workers(worker, store.address)
    kinds = watch(workers, damage)
    assert (await workers.generate(token_ids)).tokens == oracle
    assert kinds.count("block") == 1  # the whole record of block 3, and of no other
    key = block_keys(namespace_for(worker), token_ids)[3]
    inside = Inside.of(workers)
    block_id = inside.admission.pool.share(key)
    assert block_id is not None
    (record,) = await store.records([key])
    payload = bytes(inside.cache.pool[block_id].numpy())
    assert payload == bytes(record[-len(payload) :])
    inside.admission.pool.release([block_id])
    await inside.assert_all_free()


def damaged_tail(event: worker_pb2.PrefillEvent) -> worker_pb2.PrefillEvent:
    for piece in event.pieces.pieces:
        if piece.index == NUM_BLOCKS:
            flip(piece)
    return event


def unasked(event: worker_pb2.PrefillEvent) -> worker_pb2.PrefillEvent:
    for piece in event.pieces.pieces:
        piece.index = NUM_BLOCKS + 40
    return event


def without_seals(event: worker_pb2.PrefillEvent) -> worker_pb2.PrefillEvent | None:
    return None if event.WhichOneof("event") == "seal" else event


@pytest.mark.parametrize(
    ("damage", "codes"),
    [
        (damaged_tail, {grpc.StatusCode.UNAVAILABLE}),
        (unasked, {grpc.StatusCode.INTERNAL}),
        (without_seals, {grpc.StatusCode.DEADLINE_EXCEEDED}),
    ],
    ids=["tail", "unasked", "no seal"],
)
async def test_what_cannot_be_mended_ends_with_a_status(
    damage: Any,
    codes: set[grpc.StatusCode],
    runtime: Callable[[str], ModelRuntime],
    serve_workers: Any,
    make_prompt: Any,
) -> None:
    """Never a second token, nothing left behind, and the next request is served."""
    worker, token_ids = runtime("llama"), make_prompt(PROMPT_TOKENS)
    workers = await serve_workers(worker)
    watch(workers, damage)
    got = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for chunk in workers.stream(token_ids, timeout=8.0, max_tokens=8):
            got.append(chunk.token_id)
    assert caught.value.code() in codes
    assert len(got) <= 1
    watch(workers)
    assert len((await workers.generate(token_ids)).tokens) == 8
    await Inside.of(workers).assert_all_free()


async def test_a_receiver_that_does_not_read_holds_up_nobody(
    runtime: Callable[[str], ModelRuntime],
    serve_workers: Any,
    make_store: Any,
    make_prompt: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its stream fills up and prefill stops sending on it; others are served, its blocks are published, and when it
    reads at last it gets all of them."""
    cut: list[int] = []  # bytes of the pieces that prefill has cut for the slow one
    take = PieceQueue._take

    def counted(queue: PieceQueue) -> list[Piece | Seal]:
        parts = take(queue)
        if queue.covers(59):
            cut.extend(len(part.data) for part in parts if isinstance(part, Piece))
        return parts

    monkeypatch.setattr(PieceQueue, "_take", counted)
    worker, store = runtime("llama"), await make_store()
    workers = await serve_workers(worker, store.address)
    long, other = make_prompt(60 * BLOCK_SIZE), make_prompt(PROMPT_TOKENS, seed=1)
    start = worker_pb2.PrefillStart(
        request_id="slow",
        tenant="default",
        token_ids=long,
        identity=worker.identity,
        pieces=worker_pb2.PieceRequest(blocks=range(60)),
    )
    window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]  # else it grows past this prompt
    async with grpc.aio.insecure_channel(workers.prefill_address, options=window) as channel:
        call = worker_pb2_grpc.PrefillStub(channel).Prefill(timeout=LIMIT_S)
        await call.write(worker_pb2.PrefillCommand(start=start))
        async with asyncio.timeout(LIMIT_S):
            keys = block_keys(namespace_for(worker), long)
            while None in await store.records(keys):
                await asyncio.sleep(0.05)
        assert len((await workers.generate(other)).tokens) == 8
        assert sum(cut) < sum(worker.layout.payload_bytes(index) for index in range(60)) / 2
        sizes = dict.fromkeys(range(60), 0)
        seals: dict[int, bytes] = {}
        while len(seals) < 60:
            event = await call.read()
            assert event is not grpc.aio.EOF
            for piece in event.pieces.pieces:
                assert piece.offset == sizes[piece.index]
                sizes[piece.index] += len(piece.data)
            if event.WhichOneof("event") == "seal":
                seals[event.seal.index] = event.seal.checksum
        await call.done_writing()
    assert sizes == {index: worker.layout.payload_bytes(index) for index in range(60)}
    records = await store.records(keys)
    assert all(seals[index] in record[:256] for index, record in enumerate(records))
