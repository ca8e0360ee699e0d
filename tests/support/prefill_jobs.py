"""Jobs on a prefill engine, with a look at what it computes and a hand on when."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kernels.forward import AttentionStep
from kvferry.kernels.sampling import SampledToken, SamplingParams
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.key import block_keys
from kvferry.prefill.engine import PrefillEngine
from kvferry.prefill.executor import LocalPrefill
from kvferry.prefill.job import PrefillJob


@dataclass
class Submitted:
    """A job and what its callbacks said."""

    job: PrefillJob
    done: Future[list[SampledToken]]
    finished: list[int] = field(default_factory=list)

    def tokens(self, limit_s: float = 60.0) -> list[int]:
        return [token.token_id for token in self.done.result(limit_s)]


class WatchedEngine:
    """A `PrefillEngine` on a runtime's model. `before_pass` runs on its thread before each pass, with its number."""

    def __init__(
        self,
        runtime: ModelRuntime,
        *,
        before_pass: Callable[[int], None] = lambda number: None,
        max_pass_blocks: int = 1,
    ) -> None:
        self._runtime = runtime
        self.before_pass = before_pass
        self.passes: list[tuple[int, tuple[int, ...]]] = []
        """Position of the first token, and the tokens."""
        executor = LocalPrefill(self, runtime.selection.kernels, runtime.layout, runtime.loaded.device)
        self.engine = PrefillEngine(executor, max_pass_blocks=max_pass_blocks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime.model, name)

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        self.before_pass(len(self.passes))
        self.passes.append((int(positions[0]), tuple(ids.tolist())))
        return self._runtime.model.hidden(ids, positions, step)

    def make(self, token_ids: list[int], *, tenant: str = "default", **options: Any) -> Submitted:
        """A job that is not submitted yet."""
        namespace = namespace_of(self._runtime.identity, tenant=tenant, block_size=self._runtime.layout.block_size)
        done: Future[list[SampledToken]] = Future()
        finished: list[int] = []
        options.setdefault("sampling", SamplingParams())
        job = PrefillJob(
            token_ids=token_ids,
            blocks=self.engine.new_blocks(len(token_ids)),
            on_block=finished.append,
            on_done=done.set_result,
            on_error=done.set_exception,
            tenant=tenant,
            keys=block_keys(namespace, token_ids),
            **options,
        )
        return Submitted(job, done, finished)

    def submit(self, token_ids: list[int], **options: Any) -> Submitted:
        made = self.make(token_ids, **options)
        self.engine.submit(made.job)
        return made

    def close(self) -> None:
        self.engine.close()
