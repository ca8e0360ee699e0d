"""Prefill by a group of ranks: each packs and attends to its own KV heads; blocks are whole in shared memory."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvferry.deploy.rank_model import RankModel
from kvferry.deploy.ranks.guarded_step import GuardedStep, agree
from kvferry.deploy.ranks.leader import RankGroup
from kvferry.deploy.ranks.payloads import SharedPrompt, take
from kvferry.kernels.shards import layer_ranges, shard_ranges
from kvferry.prefill.chunk_step import ChunkStep
from kvferry.prefill.executor import PrefillPass, run_pass
from kvferry.prefill.prompt_blocks import LocalPromptBlocks, PromptBlocks

logger = logging.getLogger(__name__)


class RankPrompt:
    """One prompt on one rank: the packed blocks of its heads, and its bytes of the whole ones."""

    def __init__(self, rank: RankModel, num_tokens: int, shared: SharedPrompt) -> None:
        self.own = LocalPromptBlocks(rank.shard_layout, num_tokens, rank.loaded.device)
        self.shared = shared
        self._layout = rank.layout
        self._heads = rank.heads
        self._stores = rank.group.stores(rank.team.rank)

    def load(self, index: int) -> None:
        """Takes this rank's heads of a block that is whole in shared memory."""
        ranges = shard_ranges(self._layout, index, self._heads)
        self.own.load(index, take(self.shared.payload(index), ranges))

    def write(self, first: int, end: int, layer: int) -> None:
        """Puts this rank's heads of one packed layer where all ranks' are. Blocks [first, end); the incomplete one
        counts."""
        if not self._stores:
            return
        own = self.own
        for index in range(first, end):
            if index == own.num_blocks:
                self.shared.tail[layer, :, self._heads.start : self._heads.stop].copy_(own.tail[layer])
                continue
            offset, length = layer_ranges(self._layout, min(index, 1), self._heads)[layer]
            share = own.layout.join_layer(own.pool[index], own.sinks if index == 0 else None, layer)
            self.shared.payload(index)[offset : offset + length].copy_(share)


class PassResult(NamedTuple):
    logits: Tensor | None
    error: Exception | None


class RankPrefill:
    """What every rank does of a pass."""

    def __init__(self, rank: RankModel) -> None:
        self.rank = rank

    def run(self, prompt: RankPrompt, work: PrefillPass, on_layer: Callable[[int], None]) -> PassResult:
        """`on_layer` is called with each layer but the last that all ranks have packed and written: the sum over ranks
        behind a layer's attention is over when the next layer's begins."""
        size, num_tokens = self.rank.layout.block_size, len(work.token_ids)
        past = work.index - (-num_tokens // size)

        def packed(layer: int) -> None:
            if layer:
                on_layer(layer - 1)
            prompt.write(work.index, past, layer)

        step = ChunkStep(prompt.own, work.index, num_tokens, self.rank.selection.kernels, on_layer=packed)
        guarded = GuardedStep(step)
        logits = run_pass(self.rank.model, guarded, work, self.rank.loaded.device)
        return PassResult(logits, agree(self.rank.team, guarded.error, "pack its heads of a prompt"))


class GroupPrompt:
    """`PromptBlocks` on the leader."""

    def __init__(self, group: RankGroup, rank: RankModel, number: int, num_tokens: int) -> None:
        self.layout = rank.layout
        self.num_blocks, self.tail_len = divmod(num_tokens, rank.layout.block_size)
        self.num_ready = 0
        self.number = number
        """Names the prompt to followers."""
        self.shared = SharedPrompt.create(rank.layout, num_tokens)
        self.part = RankPrompt(rank, num_tokens, self.shared)
        self._send = group.send
        group.send(
            {"op": "prefill.new", "prompt": number, "num_tokens": num_tokens}, fds=[self.shared.fd], keep=self.shared
        )
        weakref.finalize(self, group.send, {"op": "prefill.drop", "prompt": number}).atexit = False

    @property
    def tail_size(self) -> int:
        return self.shared.tail.nbytes

    def load(self, index: int, payload: Tensor) -> None:
        self.layout.split_payload(payload, index)  # refuses what is damaged, before another rank sees it
        self.shared.payload(index).copy_(payload)
        self._send({"op": "prefill.load", "prompt": self.number, "index": index})
        self.part.load(index)
        self.num_ready = index + 1

    def copy(self, index: int, other: PromptBlocks) -> None:
        assert isinstance(other, GroupPrompt)
        self.shared.payload(index).copy_(other.shared.payload(index))
        self._send({"op": "prefill.copy", "prompt": self.number, "index": index, "source": other.number})
        self.part.own.copy(index, other.part.own)
        self.num_ready = index + 1

    def payload(self, index: int) -> memoryview:
        return self.shared.payload(index).numpy().data

    def layer_share(self, index: int, layer: int) -> memoryview:
        if index == self.num_blocks:
            return self.shared.tail[layer].view(torch.uint8).flatten().numpy().data
        everything = range(self.layout.num_kv_heads)
        offset, length = layer_ranges(self.layout, min(index, 1), everything)[layer]
        return self.shared.payload(index)[offset : offset + length].numpy().data

    def tail_bytes(self) -> bytes:
        return self.shared.tail.numpy().tobytes()


class GroupPrefill:
    """`PrefillExecutor` on the leader."""

    def __init__(self, group: RankGroup, rank: RankModel) -> None:
        self.layout = rank.layout
        self.vocab_size = rank.model.vocab_size
        self._group = group
        self._rank = rank
        self._part = RankPrefill(rank)
        self._numbers = itertools.count()

    def new_blocks(self, num_tokens: int) -> GroupPrompt:
        return GroupPrompt(self._group, self._rank, next(self._numbers), num_tokens)

    def run(self, blocks: PromptBlocks, work: PrefillPass, on_layer: Callable[[int], None]) -> Tensor | None:
        assert isinstance(blocks, GroupPrompt)
        message = {"op": "prefill.run", "prompt": blocks.number, **vars(work)}
        with self._group.together(message):
            logits, error = self._part.run(blocks.part, work, on_layer)
        if error is not None:
            raise error
        on_layer(self.layout.num_layers - 1)
        return logits


class PrefillFollower:
    """The same on a follower: its commands, by name."""

    def __init__(self, rank: RankModel) -> None:
        self._rank = rank
        self._part = RankPrefill(rank)
        self._prompts: dict[int, RankPrompt] = {}

    def new(self, prompt: int, num_tokens: int, fds: list[int]) -> None:
        shared = SharedPrompt(self._rank.layout, num_tokens, fds[0])
        self._prompts[prompt] = RankPrompt(self._rank, num_tokens, shared)

    def drop(self, prompt: int) -> None:
        del self._prompts[prompt]

    def load(self, prompt: int, index: int) -> None:
        self._prompts[prompt].load(index)

    def copy(self, prompt: int, index: int, source: int) -> None:
        self._prompts[prompt].own.copy(index, self._prompts[source].own)

    def run(self, prompt: int, **work: Any) -> None:
        result = self._part.run(self._prompts[prompt], PrefillPass(**work), lambda layer: None)
        if result.error is not None:
            logger.warning("a pass failed: %s", result.error)
