"""Pieces of one block, as they leave prefill and as decode takes them: whole, damaged, missing, out of order."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvferry.decode.pieces import IncomingPieces
from kvferry.decode.tail import IncomingTail
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.presets import preset
from kvferry.kvstore.codec import RecordDigest, encode_record
from kvferry.prefill import pieces as prefill_pieces
from kvferry.prefill.pieces import Piece, PieceQueue, Seal
from kvferry.prefill.prompt_blocks import LocalPromptBlocks

LAYERS, NUM_BLOCKS, TAIL_LEN = 4, 3, 5
NAMESPACE = bytes(32)


def key(index: int) -> bytes:
    return hashlib.sha256(b"%d" % index).digest()


@pytest.fixture(params=["kv2", "kv16"])
def blocks(request: pytest.FixtureRequest) -> LocalPromptBlocks:
    """Random bytes where a prompt's blocks, sinks and tail lie."""
    layout = BlockLayout(num_layers=LAYERS, num_kv_heads=2, head_dim=64, spec=preset(request.param))
    made = LocalPromptBlocks(layout, NUM_BLOCKS * layout.block_size + TAIL_LEN, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    made.pool.copy_(torch.randint(0, 256, made.pool.shape, generator=generator, dtype=torch.uint8))
    made.sinks.copy_(torch.randn(made.sinks.shape, generator=generator).half())
    made.tail.copy_(torch.randn(made.tail.shape, generator=generator).half())
    return made


def digest_of(blocks: LocalPromptBlocks, index: int) -> RecordDigest:
    size, total = blocks.layout.block_size, blocks.layout.payload_bytes(index)
    return RecordDigest(key=key(index), namespace=NAMESPACE, block_index=index, num_tokens=size, payload_bytes=total)


def queue_of(blocks: LocalPromptBlocks, wanted: list[int]) -> PieceQueue:
    return PieceQueue(blocks, wanted, lambda index: digest_of(blocks, index))


async def taken(queue: PieceQueue) -> list[Piece | Seal]:
    """All that can go now."""
    parts = []
    while part := queue._take():
        parts += part
    return parts


@pytest.mark.parametrize("piece_bytes", [2**18, 1000])
async def test_pieces_are_the_record_and_come_layer_by_layer(
    blocks: LocalPromptBlocks, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_pieces, "PIECE_BYTES", piece_bytes)
    queue = queue_of(blocks, [0, 1, 2])
    sent: list[Piece | Seal] = []
    for layer in range(LAYERS):
        queue.layer_packed(0, 2, layer)
        now = await taken(queue)
        ends = {index: sum(blocks.layout.layer_share_bytes(i, index) for i in range(layer + 1)) for index in (0, 1)}
        sent += now
        for index, end in ends.items():  # neither less than is packed nor more
            assert max(p.offset + len(p.data) for p in sent if isinstance(p, Piece) and p.index == index) == end
        assert {part.index for part in now if isinstance(part, Seal)} == (set() if layer + 1 < LAYERS else {0, 1})
    for index in (0, 1, 2):
        queue.block_packed(index)  # block 2 was computed by another job: it comes whole
    for layer in range(LAYERS):
        queue.layer_packed(NUM_BLOCKS, NUM_BLOCKS + 1, layer)
    sent += await taken(queue)
    for index in range(NUM_BLOCKS):
        pieces = [part for part in sent if isinstance(part, Piece) and part.index == index]
        assert all(len(piece.data) <= piece_bytes and zlib.crc32(piece.data) == piece.crc32 for piece in pieces)
        payload = b"".join(piece.data for piece in pieces)
        assert payload == bytes(blocks.payload(index))
        size = blocks.layout.block_size
        record = encode_record(
            key=key(index), namespace=NAMESPACE, block_index=index, num_tokens=size, payload=[payload]
        )
        (seal,) = [part for part in sent if isinstance(part, Seal) and part.index == index]
        assert seal.checksum in record
    tail = b"".join(part.data for part in sent if isinstance(part, Piece) and part.index == NUM_BLOCKS)
    assert tail == blocks.tail_bytes()
    assert Seal(NUM_BLOCKS, hashlib.sha256(tail).digest()) in sent
    assert len([part for part in sent if isinstance(part, Seal)]) == NUM_BLOCKS + 1


async def test_only_wanted_blocks_go_and_nothing_is_held_for_a_slow_receiver(blocks: LocalPromptBlocks) -> None:
    queue = queue_of(blocks, [1])
    assert [queue.covers(index) for index in range(NUM_BLOCKS)] == [False, True, False]
    for layer in range(LAYERS):
        queue.layer_packed(0, NUM_BLOCKS, layer)
    before = bytes(blocks.payload(1))
    blocks.pool[1].bitwise_not_()  # what waits is read when it is taken: there is no copy of it before
    parts = await taken(queue)
    assert {part.index for part in parts} == {1}
    assert b"".join(part.data for part in parts if isinstance(part, Piece)) == bytes(~x & 255 for x in before)


def parts_of(blocks: LocalPromptBlocks, index: int) -> tuple[list[Piece], bytes]:
    queue = queue_of(blocks, [index])
    queue.block_packed(index)
    parts: list[Piece | Seal] = []
    while part := queue._take():
        parts += part
    seal = parts.pop()
    assert isinstance(seal, Seal)
    return [part for part in parts if isinstance(part, Piece)], seal.checksum


def receiver(blocks: LocalPromptBlocks, index: int, loaded: list[int]) -> IncomingPieces:
    sizes = [blocks.layout.layer_share_bytes(layer, index) for layer in range(LAYERS)]
    return IncomingPieces(sizes, digest_of(blocks, index), lambda layer, share: loaded.append(layer))


Damage = Callable[[list[tuple[int, bytes, int]]], Any]
DAMAGES: dict[str, Damage] = {
    "a bit": lambda sent: sent.__setitem__(1, (sent[1][0], bytes([sent[1][1][0] ^ 1]) + sent[1][1][1:], sent[1][2])),
    "a bit of the crc": lambda sent: sent.__setitem__(1, (*sent[1][:2], sent[1][2] ^ 1)),
    "left out": lambda sent: sent.pop(1),
    "twice": lambda sent: sent.insert(1, sent[1]),
    "swapped": lambda sent: sent.__setitem__(slice(1, 3), [sent[2], sent[1]]),
    "cut short": lambda sent: sent.pop(),
    "one too many": lambda sent: sent.append((sent[-1][0] + len(sent[-1][1]), b"x", zlib.crc32(b"x"))),
    "forged with its crc": lambda sent: sent.__setitem__(
        1, (sent[1][0], bytes(len(sent[1][1])), zlib.crc32(bytes(len(sent[1][1]))))
    ),
    "at another place": lambda sent: sent.__setitem__(1, (sent[1][0] + 1, *sent[1][1:])),
}


@pytest.mark.parametrize("damage", [None, *DAMAGES])
def test_a_block_of_damaged_pieces_is_not_sealed(blocks: LocalPromptBlocks, damage: str | None) -> None:
    pieces, checksum = parts_of(blocks, 1)
    sent = [(piece.offset, piece.data, piece.crc32) for piece in pieces]
    if damage is not None:
        DAMAGES[damage](sent)
    loaded: list[int] = []
    incoming = receiver(blocks, 1, loaded)
    for piece in sent:
        incoming.append(*piece)
    assert incoming.sealed(checksum) == (damage is None)
    assert bool(incoming.problem) == (damage is not None)
    assert loaded == sorted(set(loaded))
    if damage in ("a bit", "left out", "swapped", "at another place"):
        assert loaded == [0]  # nothing after the damage was written anywhere


def test_a_seal_of_another_record_is_refused(blocks: LocalPromptBlocks) -> None:
    pieces, _ = parts_of(blocks, 1)
    incoming = receiver(blocks, 1, [])
    for piece in pieces:
        incoming.append(piece.offset, piece.data, piece.crc32)
    assert not incoming.sealed(parts_of(blocks, 2)[1])


def test_a_layer_that_is_refused_ends_loading(blocks: LocalPromptBlocks) -> None:
    pieces, checksum = parts_of(blocks, 1)

    def refuse(layer: int, share: bytearray) -> None:
        raise ValueError("a scale is not finite")

    sizes = [blocks.layout.layer_share_bytes(layer, 1) for layer in range(LAYERS)]
    incoming = IncomingPieces(sizes, digest_of(blocks, 1), refuse)
    for piece in pieces:
        incoming.append(piece.offset, piece.data, piece.crc32)
    assert not incoming.sealed(checksum)
    assert incoming.problem == "a scale is not finite"


def test_tail_in_pieces_and_in_chunks() -> None:
    whole = bytes(range(40))
    checksum = hashlib.sha256(whole).digest()
    tail = IncomingTail(num_layers=4, tail_bytes=40)
    for begin in range(0, 40, 10):
        data = whole[begin : begin + 10]
        tail.append_piece(begin, data, zlib.crc32(data))
        assert tail.whole is None
    with pytest.raises(ValueError, match="not the record"):
        tail.seal(bytes(32))
    assert tail.whole is None
    chunks = IncomingTail(num_layers=4, tail_bytes=40)
    chunks.append_chunk(whole[:30])
    assert chunks.whole is None
    chunks.append_chunk(whole[30:])
    assert chunks.whole == whole
    with pytest.raises(ValueError, match="too long"):
        chunks.append_chunk(b"x")
    good = IncomingTail(num_layers=4, tail_bytes=40)
    for begin in range(0, 40, 10):
        good.append_piece(begin, whole[begin : begin + 10], zlib.crc32(whole[begin : begin + 10]))
    good.seal(checksum)
    assert good.whole == whole
    assert IncomingTail(num_layers=4, tail_bytes=0).whole == b""
