"""The prefill loop: one thread, one pass at a time, requests in turn."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import NamedTuple

import torch

from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.sampling import SampledToken, SamplingParams, TokenHistory, sample
from kvferry.prefill.errors import DeadlinePassed
from kvferry.prefill.executor import PrefillExecutor, PrefillPass
from kvferry.prefill.job import PrefillJob
from kvferry.prefill.prompt_blocks import PromptBlocks
from kvferry.prefill.schedule import Schedule
from kvferry.prefill.shared_blocks import SharedBlocks
from kvferry.prefill.speed import ComputeSpeed

__all__ = ["PrefillEngine", "PrefillJob"]

logger = logging.getLogger(__name__)

SEEDS = 2**64


class _Pass(NamedTuple):
    """What one turn of a job did."""

    num_tokens: int
    finished: bool


class EngineLoad(NamedTuple):
    """What waits in an engine, without jobs that only warm the store, and how fast it goes."""

    num_jobs: int
    queued_tokens: int
    queued_s: float
    token_s: float
    """Of a token without context; 0: nothing is measured yet."""
    context_token_s: float
    computed_tokens: int
    """Since the start."""
    compute_s: float
    num_shared_blocks: int
    """Taken from jobs that were here at the same time."""


class PrefillEngine:
    """Runs prefill jobs pass by pass on the canonical grid; `Schedule` says whose turn it is.

    A pass covers 1, 2, 4, ... up to `max_pass_blocks` complete blocks, or the incomplete last one. The caller vouches
    that a row has the same bits in passes of all these widths (`deploy.pass_width`). The incomplete block is always
    alone, so its number of rows never depends on what was cached.
    """

    def __init__(self, executor: PrefillExecutor, *, max_pass_blocks: int = 1) -> None:
        self._executor = executor
        self._max_pass_blocks = max_pass_blocks
        self._schedule: Schedule[PrefillJob] = Schedule()
        self._shared = SharedBlocks()
        self._speed = ComputeSpeed()
        self._computed_tokens = 0
        self._compute_s = 0.0
        self._num_shared_blocks = 0
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="prefill-engine", daemon=True)
        self._thread.start()

    @property
    def layout(self) -> BlockLayout:
        """Of whole blocks."""
        return self._executor.layout

    def new_blocks(self, num_tokens: int) -> PromptBlocks:
        """Room for the blocks of a prompt."""
        return self._executor.new_blocks(num_tokens)

    @property
    def vocab_size(self) -> int:
        return self._executor.vocab_size

    @property
    def num_waiting(self) -> int:
        """Submitted jobs that had no turn yet."""
        with self._wake:
            return sum(job.queue_seconds is None for job in self._schedule)

    @property
    def seconds_left(self) -> float:
        """How long the submitted jobs will take, by the speed of the last passes; 0 before the first one."""
        with self._wake:
            return self._seconds_left()

    @property
    def load(self) -> EngineLoad:
        """For whoever decides which worker gets the next prompt."""
        with self._wake:
            jobs = [job for job in self._schedule if not job.warm]
            known = self._speed.is_known
            return EngineLoad(
                num_jobs=len(jobs),
                queued_tokens=sum(job.num_left for job in jobs),
                queued_s=self._seconds_of(jobs),
                token_s=self._speed.token_s if known else 0.0,
                context_token_s=self._speed.context_token_s if known else 0.0,
                computed_tokens=self._computed_tokens,
                compute_s=self._compute_s,
                num_shared_blocks=self._num_shared_blocks,
            )

    def seconds_for(self, first_token: int, end_token: int) -> float:
        """How long these tokens of a new prompt will take, by the speed of the last passes.

        Its passes take turns with those of the jobs that are here, so it waits for as much of theirs as it computes
        itself, or for all of it if that is less.
        """
        with self._wake:
            own = self._speed.seconds(first_token, end_token)
            others = sum(not job.warm for job in self._schedule)
            return own + min(self._seconds_left(), others * own)

    def compute(self, token_ids: list[int], *, timeout_s: float) -> tuple[PromptBlocks, SampledToken]:
        """Prefills a prompt while the calling thread waits; greedy first token.

        Raises what the engine raised, or TimeoutError.
        """
        blocks = self.new_blocks(len(token_ids))
        outcome: Future[list[SampledToken]] = Future()
        job = PrefillJob(
            token_ids=token_ids,
            sampling=SamplingParams(),
            blocks=blocks,
            on_block=lambda index: None,
            on_done=outcome.set_result,
            on_error=outcome.set_exception,
        )
        self.submit(job)
        try:
            return blocks, outcome.result(timeout_s)[0]
        finally:
            job.cancel()

    def submit(self, job: PrefillJob) -> None:
        with self._wake:
            if self._closing:
                raise RuntimeError("the prefill engine is closed")
            self._schedule.add(job)
            self._wake.notify()

    def close(self) -> None:
        """Ends the thread after the running pass; jobs that are left get `on_error`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _loop(self) -> None:
        while self._turn():
            pass
        for job in self._schedule:
            job.on_error(RuntimeError("the prefill worker is shutting down"))

    def _turn(self) -> bool:
        """Waits for the next job and gives it one pass; False when the engine is closing. (A function of its own, so
        that an idle engine holds no job's blocks.)"""
        turn = self._next_turn()
        if turn is None:
            return False
        job, others_wait = turn
        try:
            done = self._advance(job, others_wait=others_wait)
        except Exception as error:  # one request's failure must not end the worker
            logger.exception("prefill failed")
            with self._wake:
                self._schedule.remove(job)
            job.on_error(error)
            return True
        with self._wake:
            if done.finished:
                self._schedule.remove(job)
            else:
                self._schedule.put_back(job, served=done.num_tokens)
        return True

    def _next_turn(self) -> tuple[PrefillJob, bool] | None:
        """The next job and whether others wait; None when the engine is closing."""
        while True:
            with self._wake:
                if self._closing:
                    return None
                expired = [job for job in self._schedule.discard(_ended) if not job.cancelled]
                job = None if expired else self._schedule.take()
                if job is not None:
                    return job, self._schedule.num_ready > 0
                if not expired:
                    self._wake.wait()
            for late in expired:
                late.on_error(DeadlinePassed("the request's time was over before its prompt was computed"))
            del expired

    def _advance(self, job: PrefillJob, *, others_wait: bool) -> _Pass:
        """Takes what others have of the job's next blocks, then computes one pass."""
        started = time.monotonic()
        if job.queue_seconds is None:
            job.queue_seconds = started - job.submitted
        self._take_shared(job)
        num_tokens = 0
        tokens: list[SampledToken] = []
        if job.num_left:
            begin = len(job.token_ids) - job.num_left
            num_tokens, tokens = self._compute(job, 1 if others_wait or job.warm else self._max_pass_blocks)
            seconds = time.monotonic() - started
            job.compute_seconds += seconds
            self._computed_tokens += num_tokens
            self._compute_s += seconds
            self._measure(begin, begin + num_tokens, seconds)
        finished = job.num_left == 0 or bool(tokens)
        if finished and not job.cancelled:
            job.on_done(tokens)
        return _Pass(num_tokens, finished)

    def _take_shared(self, job: PrefillJob) -> None:
        blocks = job.blocks
        first = blocks.num_ready
        # A first token needs the hidden state of the last token: at least that one's block is computed.
        limit = blocks.num_blocks if job.warm else (len(job.token_ids) - 1) // self.layout.block_size
        self._shared.take(job.keys, blocks, limit=limit)
        job.num_shared_blocks += blocks.num_ready - first
        self._num_shared_blocks += blocks.num_ready - first
        self._finish_blocks(job, first)

    def _compute(self, job: PrefillJob, max_blocks: int) -> tuple[int, list[SampledToken]]:
        """Computes the next blocks, or the incomplete last one. Returns its tokens and, at the end of the prompt, the
        first token of each answer."""
        blocks, size = job.blocks, self.layout.block_size
        index = blocks.num_ready
        width = _power_of_two(min(blocks.num_blocks - index, max_blocks))
        begin = index * size
        end = min(begin + width * size, len(job.token_ids))
        num_tokens = end - begin
        past = index + width  # of the incomplete block, too

        def on_layer(layer: int) -> None:
            if not job.cancelled:
                job.on_layer(index, past, layer)

        last = end == len(job.token_ids) and not job.warm
        work = PrefillPass(index=index, begin=begin, token_ids=job.token_ids[begin:end], wants_logits=last)
        logits = self._executor.run(blocks, work, on_layer)
        tokens = [] if logits is None else self._first_tokens(job, logits)
        blocks.num_ready = min(index + width, blocks.num_blocks)
        self._finish_blocks(job, index)
        return num_tokens, tokens

    def _finish_blocks(self, job: PrefillJob, first: int) -> None:
        """Makes the complete blocks from `first` on known."""
        self._shared.offer(job.keys, job.blocks)
        for index in range(first, job.blocks.num_ready):
            if not job.cancelled:
                job.on_block(index)

    def _first_tokens(self, job: PrefillJob, logits: torch.Tensor) -> list[SampledToken]:
        history = TokenHistory.of(job.token_ids)
        seeds = [(job.sampling.seed + answer) % SEEDS for answer in range(job.num_answers)]
        return [sample(logits, replace(job.sampling, seed=seed), history) for seed in seeds]

    def _measure(self, begin: int, end: int, seconds: float) -> None:
        """Of the passes over an incomplete block only the first of all counts: they say little of complete ones."""
        if end - begin < self.layout.block_size and self._speed.is_known:
            return
        with self._wake:
            self._speed.measure(begin, end, seconds)

    def _seconds_left(self) -> float:
        return self._seconds_of(self._schedule)

    def _seconds_of(self, jobs: Iterable[PrefillJob]) -> float:
        if not self._speed.is_known:
            return 0.0
        return sum(self._speed.seconds(len(job.token_ids) - job.num_left, len(job.token_ids)) for job in jobs)


def _ended(job: PrefillJob) -> bool:
    """Nobody waits for the job any more."""
    return job.cancelled or (job.deadline is not None and time.monotonic() >= job.deadline)


def _power_of_two(limit: int) -> int:
    """The largest power of two up to `limit`, and at least 1."""
    return 1 << max(limit.bit_length() - 1, 0)
