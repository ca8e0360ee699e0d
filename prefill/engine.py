"""The prefill loop: one thread, one chunk at a time, requests in turn."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from kvferry.kernels.forward import CausalModel, padded_rows
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.packed import PackedKernels
from kvferry.kernels.sampling import SampledToken, SamplingParams, TokenHistory, sample
from kvferry.prefill.chunk_step import ChunkStep
from kvferry.prefill.prompt_blocks import PromptBlocks

logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class PrefillJob:
    """A prompt to compute from its block `blocks.num_ready` on.

    The callbacks run on the engine's thread and must not block: `on_block(index)` after a block is packed in every
    layer, then `on_done(first_token)`, or `on_error(error)` instead. After `cancel()` none of them is called again
    once the running chunk has ended.
    """

    token_ids: list[int]
    sampling: SamplingParams
    blocks: PromptBlocks
    on_block: Callable[[int], None]
    on_done: Callable[[SampledToken], None]
    on_error: Callable[[Exception], None]
    submitted: float = field(default_factory=time.monotonic)
    queue_seconds: float | None = None
    compute_seconds: float = 0.0
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class PrefillEngine:
    """Runs prefill jobs chunk by chunk on the canonical grid, round-robin, so that a short prompt is not stuck
    behind a long one. A chunk is one block; its width never depends on what was cached."""

    def __init__(
        self,
        model: CausalModel,
        kernels: PackedKernels,
        layout: BlockLayout,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.device = device
        self._model = model
        self._kernels = kernels
        self._jobs: deque[PrefillJob] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="prefill-engine", daemon=True)
        self._thread.start()

    def new_blocks(self, num_tokens: int) -> PromptBlocks:
        """Room for the blocks of a prompt."""
        return PromptBlocks(self.layout, num_tokens, self.device)

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def compute(self, token_ids: list[int], *, timeout_s: float) -> tuple[PromptBlocks, SampledToken]:
        """Prefills a prompt while the calling thread waits; greedy first token.

        Raises what the engine raised, or TimeoutError.
        """
        blocks = self.new_blocks(len(token_ids))
        outcome: Future[SampledToken] = Future()
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
            return blocks, outcome.result(timeout_s)
        finally:
            job.cancel()

    def submit(self, job: PrefillJob) -> None:
        with self._wake:
            if self._closing:
                raise RuntimeError("the prefill engine is closed")
            self._jobs.append(job)
            self._wake.notify()

    def close(self) -> None:
        """Ends the thread after the running chunk; jobs that are left get `on_error`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _loop(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                finished = self._advance(job)
            except Exception as error:  # one request's failure must not end the worker
                logger.exception("prefill failed")
                job.on_error(error)
                continue
            if not finished:
                with self._wake:
                    self._jobs.append(job)
        for job in self._jobs:
            job.on_error(RuntimeError("the prefill worker is shutting down"))

    def _next_job(self) -> PrefillJob | None:
        with self._wake:
            while True:
                if self._closing:
                    return None
                while self._jobs:
                    job = self._jobs.popleft()
                    if not job.cancelled:
                        return job
                self._wake.wait()

    def _advance(self, job: PrefillJob) -> bool:
        """Computes one chunk; True when the job needs no more."""
        started = time.monotonic()
        if job.queue_seconds is None:
            job.queue_seconds = started - job.submitted
        blocks = job.blocks
        index = blocks.num_ready
        begin = index * self.layout.block_size
        end = min(begin + self.layout.block_size, len(job.token_ids))
        num_tokens = end - begin
        padding = [0] * (padded_rows(num_tokens) - num_tokens)
        hidden = self._model.hidden(
            torch.tensor(job.token_ids[begin:end] + padding, device=self.device),
            torch.tensor([*range(begin, end), *padding], device=self.device),
            ChunkStep(blocks, index, num_tokens, self._kernels),
        )
        last = end == len(job.token_ids)
        token = self._first_token(job, hidden[num_tokens - 1]) if last else None
        job.compute_seconds += time.monotonic() - started
        if index < blocks.num_blocks:
            blocks.num_ready = index + 1
            if not job.cancelled:
                job.on_block(index)
        if token is not None and not job.cancelled:
            job.on_done(token)
        return last

    def _first_token(self, job: PrefillJob, hidden: torch.Tensor) -> SampledToken:
        rows = hidden.expand(padded_rows(1), -1).contiguous()
        logits = self._model.logits(rows)[0]
        return sample(logits, job.sampling, TokenHistory.of(job.token_ids))
