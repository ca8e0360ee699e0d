"""Decode by a group of ranks: each holds its own KV heads of every block, tail and ring, and attends to them."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvferry.decode.attention import DecodeStep
from kvferry.decode.cache import PackedCache
from kvferry.decode.executor import StepInput, run_step
from kvferry.decode.memory import HeldKV, SwappedKV
from kvferry.deploy.rank_model import RankModel
from kvferry.deploy.ranks.guarded_step import GuardedStep, agree
from kvferry.deploy.ranks.leader import RankGroup
from kvferry.deploy.ranks.payloads import take
from kvferry.deploy.row_padding import row_padding
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.shards import shard_ranges

logger = logging.getLogger(__name__)


class RankDecode:
    """What every rank has and does."""

    def __init__(self, rank: RankModel, *, num_blocks: int, num_slots: int) -> None:
        self.cache = PackedCache(
            rank.shard_layout,
            num_blocks=num_blocks,
            num_slots=num_slots,
            kernels=rank.selection.kernels,
            device=rank.loaded.device,
            windows=rank.windows,
        )
        self._rank = rank
        self._pad_rows = row_padding(rank.rows_invariant, num_slots)

    def pack_tail(self, slot: int, block_id: int, index: int) -> Exception | None:
        failure: Exception | None = None
        try:
            self.cache.pack_tail(slot, block_id, index=index)
        except Exception as error:  # for all ranks to raise
            failure = error
        return agree(self._rank.team, failure, "pack its heads of a tail")

    def step(self, batch: StepInput) -> tuple[Tensor, Exception | None]:
        rank, cache = self._rank, self.cache
        tables = cache.batch(block_tables=batch.block_tables, slots=batch.slots, tail_lens=batch.tail_lens)
        guarded = GuardedStep(DecodeStep(cache, tables, rank.selection.kernels))
        logits = run_step(rank.model, guarded, batch, self._pad_rows, cache.device)
        return logits, agree(rank.team, guarded.error, "attend to its heads")


class _Saved:
    """`SwappedKV` of all ranks; this is the leader's part."""

    def __init__(self, number: int, own: SwappedKV, *, size: int) -> None:
        self.number = number
        self.own = own
        self.num_bytes = own.num_bytes * size


class GroupMemory:
    """`KVMemory` on the leader. Bytes go to each rank in the stream of commands, only its own heads': they are in order
    with the steps that read them, and nobody has to say when a buffer is free again."""

    num_shares = 1

    def __init__(self, group: RankGroup, rank: RankModel, own: PackedCache, number: int) -> None:
        self.layout: BlockLayout = rank.layout
        self.num_blocks = own.num_blocks
        self._group = group
        self._rank = rank
        self._own = own
        self._number = number
        self._saved_numbers = itertools.count()
        weakref.finalize(self, group.send, {"op": "decode.drop", "memory": number}).atexit = False

    def in_ring(self, block_index: int, num_blocks: int) -> bool:
        return self._own.in_ring(block_index, num_blocks)

    def load_block(self, payload: Tensor, block_index: int, *, block_id: int | None, slot: int | None) -> None:
        self.layout.split_payload(payload, block_index)  # refuses what is damaged, before another rank sees it

        def part(heads: range) -> Tensor:
            return take(payload, shard_ranges(self.layout, block_index, heads))

        where = {"block_index": block_index, "block_id": block_id, "slot": slot}
        self._send_parts("load_block", "payload", part, **where)
        self._own.load_block(part(self._rank.heads), block_index, block_id=block_id, slot=slot)

    def load_layer(
        self, share: Tensor, layer: int, block_index: int, *, block_id: int | None, slot: int | None
    ) -> Tensor | None:
        _, sinks = self.layout.split_layer(share, layer, block_index)
        by_head = share.view(self.layout.num_kv_heads, -1)

        def part(heads: range) -> Tensor:
            return by_head[heads.start : heads.stop].reshape(-1)

        where = {"layer": layer, "block_index": block_index, "block_id": block_id, "slot": slot}
        self._send_parts("load_layer", "share", part, **where)
        self._own.load_layer(part(self._rank.heads), layer, block_index, block_id=block_id, slot=slot)
        return sinks

    def keep_sinks(self, block_id: int, sinks: Tensor) -> None:
        def part(heads: range) -> Tensor:
            return sinks[:, heads.start : heads.stop].contiguous()

        self._send_parts("keep_sinks", "sinks", part, block_id=block_id)
        self._own.keep_sinks(block_id, part(self._rank.heads))

    def forget(self, block_id: int) -> None:
        self._send("forget", block_id=block_id)
        self._own.forget(block_id)

    def use_sinks(self, slot: int, block_id: int) -> None:
        self._send("use_sinks", slot=slot, block_id=block_id)
        self._own.use_sinks(slot, block_id)

    def copy_slot(self, source: int, target: int, *, tail_len: int) -> None:
        self._send("copy_slot", source=source, target=target, tail_len=tail_len)
        self._own.copy_slot(source, target, tail_len=tail_len)

    def load_tail(self, slot: int, tail: bytes) -> int:
        layers, two, heads, block_size, _ = self.layout.tail_shape
        tokens, rest = divmod(len(tail), self.layout.bytes_per_token_bf16)
        if rest or tokens >= block_size:
            raise ValueError(f"a tail of {len(tail)} bytes does not fit this model")
        if tokens:
            whole = torch.frombuffer(bytearray(tail), dtype=torch.uint8).view(layers * two, heads, -1)

            def part(heads: range) -> Tensor:
                return whole[:, heads.start : heads.stop].contiguous()

            self._send_parts("load_tail", "tail", part, slot=slot)
            self._own.load_tail(slot, part(self._rank.heads).numpy().tobytes())
        return tokens

    def swap_out(self, held: HeldKV) -> _Saved:
        number = next(self._saved_numbers)
        self._send("swap_out", saved=number, **vars(held))
        saved = _Saved(number, self._own.swap_out(held), size=self._rank.team.size)
        weakref.finalize(saved, self._send, "drop_saved", saved=number).atexit = False
        return saved

    def swap_in(self, saved: SwappedKV, held: HeldKV, *, present: frozenset[int]) -> None:
        assert isinstance(saved, _Saved)
        self._send("swap_in", saved=saved.number, present=sorted(present), **vars(held))
        self._own.swap_in(saved.own, held, present=present)

    def _send(self, op: str, **arguments: Any) -> None:
        self._group.send({"op": f"decode.{op}", "memory": self._number, **arguments})

    def _send_parts(self, op: str, name: str, part: Callable[[range], Tensor], **arguments: Any) -> None:
        message = {"op": f"decode.{op}", "memory": self._number, **arguments}
        heads_of = self._rank.group.heads
        self._group.send_each(lambda rank: {**message, name: part(heads_of(rank)).numpy().tobytes()})


class GroupDecode:
    """`DecodeExecutor` on the leader."""

    def __init__(self, group: RankGroup, rank: RankModel, number: int, *, num_blocks: int, num_slots: int) -> None:
        """`number` names the memory to followers."""
        self._group = group
        self._number = number
        group.send({"op": "decode.open", "memory": number, "num_blocks": num_blocks, "num_slots": num_slots})
        self._part = RankDecode(rank, num_blocks=num_blocks, num_slots=num_slots)
        self.memory = GroupMemory(group, rank, self._part.cache, number)

    def pack_tail(self, slot: int, block_id: int, *, index: int) -> None:
        message = {"op": "decode.pack_tail", "slot": slot, "block_id": block_id, "index": index}
        with self._group.together({"memory": self._number, **message}):
            error = self._part.pack_tail(slot, block_id, index)
        if error is not None:
            raise error

    def step(self, batch: StepInput) -> Tensor:
        with self._group.together({"op": "decode.step", "memory": self._number, **vars(batch)}):
            logits, error = self._part.step(batch)
        if error is not None:
            raise error
        return logits


class DecodeFollower:
    """The same on a follower: its commands, by name."""

    def __init__(self, rank: RankModel) -> None:
        self._rank = rank
        self._parts: dict[int, RankDecode] = {}
        self._saved: dict[tuple[int, int], SwappedKV] = {}

    def open(self, memory: int, num_blocks: int, num_slots: int) -> None:
        self._parts[memory] = RankDecode(self._rank, num_blocks=num_blocks, num_slots=num_slots)

    def drop(self, memory: int) -> None:
        del self._parts[memory]

    def load_block(self, memory: int, payload: bytes, block_index: int, block_id: int | None, slot: int | None) -> None:
        self._cache(memory).load_block(_tensor(payload), block_index, block_id=block_id, slot=slot)

    def load_layer(
        self, memory: int, share: bytes, layer: int, block_index: int, block_id: int | None, slot: int | None
    ) -> None:
        self._cache(memory).load_layer(_tensor(share), layer, block_index, block_id=block_id, slot=slot)

    def keep_sinks(self, memory: int, block_id: int, sinks: bytes) -> None:
        shape = self._rank.shard_layout.sink_shape
        self._cache(memory).keep_sinks(block_id, _tensor(sinks).view(torch.float16).view(shape))

    def forget(self, memory: int, block_id: int) -> None:
        self._cache(memory).forget(block_id)

    def use_sinks(self, memory: int, slot: int, block_id: int) -> None:
        self._cache(memory).use_sinks(slot, block_id)

    def copy_slot(self, memory: int, source: int, target: int, tail_len: int) -> None:
        self._cache(memory).copy_slot(source, target, tail_len=tail_len)

    def load_tail(self, memory: int, slot: int, tail: bytes) -> None:
        self._cache(memory).load_tail(slot, tail)

    def swap_out(self, memory: int, saved: int, **held: Any) -> None:
        self._saved[memory, saved] = self._cache(memory).swap_out(HeldKV(**held))

    def swap_in(self, memory: int, saved: int, present: list[int], **held: Any) -> None:
        self._cache(memory).swap_in(self._saved[memory, saved], HeldKV(**held), present=frozenset(present))

    def drop_saved(self, memory: int, saved: int) -> None:
        del self._saved[memory, saved]

    def pack_tail(self, memory: int, slot: int, block_id: int, index: int) -> None:
        self._log(self._parts[memory].pack_tail(slot, block_id, index))

    def step(self, memory: int, **batch: Any) -> None:
        _, error = self._parts[memory].step(StepInput(**batch))
        self._log(error)

    def _cache(self, memory: int) -> PackedCache:
        return self._parts[memory].cache

    @staticmethod
    def _log(error: Exception | None) -> None:
        if error is not None:
            logger.warning("a step failed: %s", error)


def _tensor(raw: bytes) -> Tensor:
    """Also of no bytes, which `frombuffer` refuses: a spec without sinks has some."""
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
