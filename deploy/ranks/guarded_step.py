"""An attention step that may fail on one rank without the others waiting for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kvferry.deploy.ranks.errors import RankFailed
from kvferry.kernels.forward import AttentionStep

logger = logging.getLogger(__name__)


class Votes(Protocol):
    """The part of `Collectives` by which ranks agree."""

    def all_true(self, flag: bool) -> bool: ...


class FirstError:
    """Keeps the first error among the parts of a pass, and goes on with something else: for steps whose collectives lie
    between the parts."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def guard(self, compute: Callable[[], Tensor], otherwise: Callable[[], Tensor]) -> Tensor:
        """`compute()`; `otherwise()` when it fails, or when a part before it has."""
        if self.error is None:
            try:
                return compute()
            except Exception as error:  # for `agree` to raise
                self.error = error
        return otherwise()


class GuardedStep:
    """`AttentionStep` that keeps the first error of another one and goes on with zeros: the ranks' collectives stay
    matched, and when the pass is over all of them hear of it."""

    def __init__(self, step: AttentionStep) -> None:
        self._step = step
        self.error: Exception | None = None

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        if self.error is None:
            try:
                return self._step.attend(layer, query, key, value, scale=scale, window=window, softcap=softcap)
            except Exception as error:  # for `agree` to raise
                self.error = error
        return torch.zeros_like(query)


def agree(team: Votes, error: Exception | None, what: str) -> Exception | None:
    """What every rank has to raise for `what`: its own error, or RankFailed when it was another's; None when all did
    their part."""
    if team.all_true(error is None):
        return None
    return error or RankFailed(f"another rank could not {what}")
