"""The product's decode engine as something that decodes so many tokens and stops. All that this folder knows of
`DecodeEngine`, `PackedCache` and `Sequence` is here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise

from kvferry.decode.cache import PackedCache
from kvferry.decode.engine import DecodeEngine
from kvferry.decode.executor import LocalDecode
from kvferry.decode.sequence import Sequence, SequenceListener, TokenEvent
from kvferry.deploy.benchmark.step_time import StepTime, now
from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kernels.forward import padded_rows
from kvferry.kernels.sampling import SamplingParams, TokenHistory
from kvferry.prefill.prompt_blocks import LocalPromptBlocks

STEP_TIMEOUT_S = 120.0
PAUSE_TIMEOUT_S = 3600.0
"""Longest turn of the other contenders."""
FIRST_TOKEN = 1


class PackedDecoder:
    """`batch` sequences with one context each, decoded greedily in steps of all of them."""

    def __init__(
        self, runtime: ModelRuntime, cache: PackedCache, sequences: Callable[[SequenceListener], list[Sequence]]
    ) -> None:
        """Use `copies_of` or `in_place`."""
        self._cache = cache
        self._waiting = sequences(self)
        self._batch = 1  # the first sequence's first step holds the engine until the others have joined
        self._reported = 0
        self._stamps: list[StepTime] = []
        self._wanted = 1
        self._reached = threading.Event()
        self._resume = threading.Event()
        self._error: Exception | None = None
        invariant, rows = runtime.rows_invariant, len(self._waiting)
        self._engine = DecodeEngine(
            LocalDecode(
                runtime.model,
                runtime.selection.kernels,
                cache,
                pad_rows=padded_rows if invariant else lambda n: rows,
            )
        )

    @classmethod
    def copies_of(
        cls, runtime: ModelRuntime, blocks: LocalPromptBlocks, *, batch: int, max_tokens: int
    ) -> PackedDecoder:
        """Each sequence gets its own copy of the blocks, so that every step reads all of them from memory."""
        layout, held = runtime.layout, blocks.num_blocks
        room = held + (blocks.tail_len + max_tokens) // layout.block_size
        cache = PackedCache(
            layout,
            num_blocks=max(1, room * batch),
            num_slots=batch,
            kernels=runtime.selection.kernels,
            device=runtime.loaded.device,
        )
        for row in range(batch):
            cache.pool[row * room : row * room + held].copy_(blocks.pool)
            _load_ends(cache, row, blocks)
        ids = [list(range(row * room, (row + 1) * room)) for row in range(batch)]
        return cls(
            runtime,
            cache,
            lambda listener: [_sequence(row, blocks, ids[row], max_tokens, listener) for row in range(batch)],
        )

    @classmethod
    def in_place(cls, runtime: ModelRuntime, blocks: LocalPromptBlocks, *, max_tokens: int) -> PackedDecoder:
        """One sequence that reads `blocks` where they are, as if they had been fetched: one copy in memory.

        Raises ValueError when the tokens would fill the tail: there is no room for another block.
        """
        layout = runtime.layout
        if blocks.tail_len + max_tokens >= layout.block_size:
            raise ValueError(
                f"{max_tokens} tokens after a tail of {blocks.tail_len} would fill a block of {layout.block_size}: "
                "decode fewer"
            )
        cache = PackedCache(
            layout, num_blocks=1, num_slots=1, kernels=runtime.selection.kernels, device=runtime.loaded.device
        )
        cache.pool = blocks.pool
        _load_ends(cache, 0, blocks)
        ids = list(range(blocks.num_blocks))
        return cls(runtime, cache, lambda listener: [_sequence(0, blocks, ids, max_tokens, listener)])

    def run(self, steps: int) -> list[StepTime]:
        """Times of each of `steps` steps. Raises RuntimeError when the engine fails or does not answer."""
        if self._waiting:
            self._join()
        self._stamps, self._wanted = [now()], steps
        self._continue(STEP_TIMEOUT_S * steps)
        return [after.since(before) for before, after in pairwise(self._stamps)]

    def close(self) -> None:
        """Ends the engine's thread."""
        self._resume.set()
        self._engine.close()

    def _join(self) -> None:
        first, *others = self._waiting
        self._waiting = []
        self._stamps = [now()]
        self._engine.add(first)
        self._wait(STEP_TIMEOUT_S)
        for sequence in others:
            self._engine.add(sequence)
        self._batch = 1 + len(others)

    def _continue(self, timeout_s: float) -> None:
        self._reached.clear()
        self._resume.set()
        self._wait(timeout_s)

    def _wait(self, timeout_s: float) -> None:
        if not self._reached.wait(timeout_s) or self._error is not None:
            raise RuntimeError(f"the decode engine did not answer: {self._error or 'no token in time'}")

    def token(self, sequence: Sequence, event: TokenEvent) -> None:
        self._reported += 1
        if self._reported < self._batch:
            return
        self._reported = 0
        self._stamps.append(now())
        if len(self._stamps) > self._wanted:
            self._resume.clear()
            self._reached.set()
            self._resume.wait(PAUSE_TIMEOUT_S)  # the other contenders' turn

    def error(self, sequence: Sequence, error: Exception) -> None:
        self._error = error
        self._reached.set()

    def block_used(self, sequence: Sequence) -> None:
        """All blocks were there from the beginning."""

    def released(self, sequence: Sequence) -> None:
        """The engine is closed, or `error` said why."""


def _load_ends(cache: PackedCache, slot: int, blocks: LocalPromptBlocks) -> None:
    """Sinks and tail."""
    cache.sinks[slot].copy_(blocks.sinks)
    cache.tails[slot, :, :, :, : blocks.tail_len].copy_(blocks.tail)


def _sequence(
    slot: int, blocks: LocalPromptBlocks, block_ids: list[int], max_tokens: int, listener: SequenceListener
) -> Sequence:
    history = TokenHistory.of([])
    history.append(FIRST_TOKEN)
    return Sequence(
        num_prompt_tokens=blocks.num_blocks * blocks.layout.block_size + blocks.tail_len,
        sampling=SamplingParams(max_tokens=max_tokens + 1),
        history=history,
        slot=slot,
        block_ids=block_ids,
        num_blocks=blocks.num_blocks,
        tail_len=blocks.tail_len,
        last_token=FIRST_TOKEN,
        listener=listener,
    )
