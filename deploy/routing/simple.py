"""The policies that look at no prompt."""

from __future__ import annotations

from typing import TypeVar

from kvferry.deploy.routing.candidates import Candidates
from kvferry.deploy.routing.router import UNNOTICED, Route, RoutedRequest
from kvferry.deploy.routing.worker_state import WorkerState

W = TypeVar("W", bound=WorkerState)


class RoundRobin:
    """Every worker in turn, decode and prefill workers each in a turn of their own."""

    def __init__(self) -> None:
        self._turn = 0

    def pick(self, candidates: Candidates[W], request: RoutedRequest) -> Route[W]:
        groups = candidates.groups
        turn = self._turn
        self._turn += 1
        # By decode workers: a group that has more of them gets more requests.
        position = turn % sum(len(group.decodes) for group in groups)
        for group in groups:
            if position < len(group.decodes):
                break
            position -= len(group.decodes)
        prefill = group.prefills[turn % len(group.prefills)] if group.prefills else None
        decode = group.decodes[position]
        return Route(decode, None if prefill is decode else prefill, UNNOTICED)


class LeastLoaded:
    """The workers with the fewest requests of this gateway; among equals, the one that has rested longest."""

    def pick(self, candidates: Candidates[W], request: RoutedRequest) -> Route[W]:
        decode, group = min(
            ((min(group.decodes, key=_load), group) for group in candidates.groups), key=lambda pair: _load(pair[0])
        )
        prefill = min(group.prefills, key=_load) if group.prefills else None
        return Route(decode, None if prefill is decode else prefill, UNNOTICED)


def _load(worker: WorkerState) -> tuple[int, int]:
    return worker.num_outstanding, worker.last_used
