"""The decode loop: one thread, continuous batching, one step for all running sequences at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

import torch

from kvferry.decode.executor import DecodeExecutor, StepInput
from kvferry.decode.sequence import Sequence, TokenEvent
from kvferry.kernels.sampling import finish_reason, sample

logger = logging.getLogger(__name__)

STEP_SMOOTHING = 0.1
"""Weight of the newest step in `DecodeEngine.step_seconds`."""


class DecodeEngine:
    """Runs sequences until they finish. They join and leave between steps."""

    def __init__(self, executor: DecodeExecutor) -> None:
        self._executor = executor
        self._joining: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._wake = threading.Condition()
        self._closing = False
        self.step_seconds = 0.0
        """What the last steps took, smoothed; 0 before the first."""
        self._thread = threading.Thread(target=self._loop, name="decode-engine", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """Sequences in the engine."""
        return len(self._running) + len(self._joining)

    def add(self, sequence: Sequence) -> None:
        """Raises RuntimeError when the engine is closed."""
        with self._wake:
            if self._closing:
                raise RuntimeError("the decode engine is closed")
            sequence.leaving = False
            self._joining.append(sequence)
            self._wake.notify()

    def remove(self, sequence: Sequence) -> None:
        """The sequence leaves before the next step; its listener hears when. Its state is whole: `add` resumes it."""
        with self._wake:
            sequence.leaving = True
            self._wake.notify()

    def grant(self, sequence: Sequence, block_id: int) -> None:
        """Gives a sequence a spare block."""
        with self._wake:
            sequence.block_ids.append(block_id)
            self._wake.notify()

    def close(self) -> None:
        """Ends the thread after the running step; sequences that are left fail."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _loop(self) -> None:
        while sequences := self._gather():
            started = time.monotonic()
            try:
                self._step(sequences)
            except Exception as error:  # a failed step ends its sequences, not the worker
                logger.exception("decode step failed")
                for sequence in sequences:
                    self._fail(sequence, error)
                continue
            taken = time.monotonic() - started
            self.step_seconds += (taken - self.step_seconds) * (STEP_SMOOTHING if self.step_seconds else 1.0)
        for sequence in (*self._running, *self._joining):
            self._fail(sequence, RuntimeError("the decode worker is shutting down"))

    def _gather(self) -> list[Sequence]:
        """Waits until there is something to decode, and says what; nothing when the engine is closing."""
        with self._wake:
            while True:
                self._running.extend(self._joining)
                self._joining.clear()
                for sequence in [s for s in self._running if s.leaving]:
                    self._release(sequence)
                ready = [s for s in list(self._running) if self._has_room(s)]
                if self._closing:
                    return []
                if ready:
                    return ready
                self._wake.wait()

    def _has_room(self, sequence: Sequence) -> bool:
        """Packs the tail if it is full. False when there is no block for it, or it cannot be packed."""
        if sequence.tail_len < self._executor.memory.layout.block_size:
            return True
        if sequence.num_blocks == len(sequence.block_ids):
            return False
        try:
            index = sequence.num_blocks
            self._executor.pack_tail(sequence.slot, sequence.block_ids[index], index=index)
        except Exception as error:  # one sequence's failure must not end the batch
            self._fail(sequence, error)
            return False
        sequence.num_blocks += 1
        sequence.tail_len = 0
        sequence.listener.block_used(sequence)
        return True

    def _step(self, sequences: list[Sequence]) -> None:
        """Computes one token of every sequence."""
        for sequence in sequences:
            sequence.tail_len += 1
        logits = self._executor.step(
            StepInput(
                token_ids=[s.last_token for s in sequences],
                positions=[s.position for s in sequences],
                block_tables=[s.block_table for s in sequences],
                slots=[s.slot for s in sequences],
                tail_lens=[s.tail_len for s in sequences],
            )
        )
        for row, sequence in enumerate(sequences):
            self._finish_token(sequence, logits[row])

    def _finish_token(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Samples and reports one sequence's token; the sequence leaves with its last one."""
        try:
            token = sample(logits, sequence.sampling, sequence.history)
            index = sequence.history.num_output
            sequence.history.append(token.token_id)
            reason = finish_reason(token.token_id, sequence.history, sequence.sampling)
        except Exception as error:  # one row's failure must not end the batch
            self._fail(sequence, error)
            return
        sequence.last_token = token.token_id
        sequence.listener.token(sequence, TokenEvent(index, token, reason))
        if reason:
            self._release(sequence)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        sequence.listener.error(sequence, error)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        sequence.listener.released(sequence)
