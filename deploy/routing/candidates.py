"""The workers that may serve together: groups of equal identity instead of a list of all pairs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvferry.deploy.routing.worker_state import WorkerState

W = TypeVar("W", bound=WorkerState)


@dataclass(frozen=True, eq=False)
class Group(Generic[W]):
    """Any of `decodes` with any of `prefills`; without prefills, each decode worker prefills by itself."""

    decodes: tuple[W, ...]
    prefills: tuple[W, ...]


class Candidates(Generic[W]):
    """All groups, none of them without a usable pair. Immutable."""

    def __init__(self, groups: Iterable[Group[W]], *, everyone: Candidates[W] | None = None) -> None:
        self.everyone: Candidates[W] = everyone or self
        """What these were chosen from: workers that are only left out of one choice are still members."""
        self.groups = tuple(groups)
        windows = [_window(w) for group in self.groups for w in (*group.decodes, *group.prefills)]
        self._least_window = min(windows, default=0)
        self.max_model_len = max((_group_window(group) for group in self.groups), default=0)
        """Tokens of the longest request that a pair has room for."""

    @classmethod
    def of(cls, decodes: Sequence[W], prefills: Sequence[W], *, has_prefills: bool) -> Candidates[W]:
        """Groups usable workers by identity. Without `has_prefills`, decode workers with the role prefill do both."""
        groups = []
        if not has_prefills:
            alone = tuple(w for w in decodes if w.has_role("prefill"))
            groups = [Group(alone, ())] if alone else []
        else:
            by_identity: dict[bytes, tuple[list[W], list[W]]] = {}
            for index, workers in enumerate((decodes, prefills)):
                for worker in workers:
                    by_identity.setdefault(_identity(worker), ([], []))[index].append(worker)
            groups = [Group(tuple(d), tuple(p)) for d, p in by_identity.values() if d and p]
        return cls(groups)

    def __bool__(self) -> bool:
        return bool(self.groups)

    @property
    def num_pairs(self) -> int:
        return sum(len(group.decodes) * max(len(group.prefills), 1) for group in self.groups)

    def with_room(self, num_tokens: int) -> Candidates[W]:
        """Only workers whose window takes a request of so many tokens."""
        if num_tokens <= self._least_window:
            return self
        return self._keep([w for g in self.groups for w in (*g.decodes, *g.prefills) if _window(w) < num_tokens])

    def without(self, failed: Collection[W]) -> Candidates[W]:
        """No failed worker; or else pairs of which one has not failed."""
        if not failed:
            return self
        return self._keep(failed) or Candidates(
            [g for group in self.groups for g in _half_failed(group, failed)], everyone=self.everyone
        )

    def _keep(self, unwanted: Collection[W]) -> Candidates[W]:
        groups = []
        for group in self.groups:
            decodes, prefills = (tuple(w for w in ws if w not in unwanted) for ws in (group.decodes, group.prefills))
            if decodes and (prefills or not group.prefills):
                groups.append(Group(decodes, prefills))
        return Candidates(groups, everyone=self.everyone)


def _half_failed(group: Group[W], failed: Collection[W]) -> list[Group[W]]:
    decodes, prefills = (tuple(w for w in ws if w not in failed) for ws in (group.decodes, group.prefills))
    if decodes and group.prefills:
        return [Group(decodes, group.prefills)]
    return [Group(group.decodes, prefills)] if prefills else []


def _window(worker: WorkerState) -> int:
    return worker.info.max_model_len if worker.info else 0


def _group_window(group: Group[W]) -> int:
    decode = max(map(_window, group.decodes))
    return min(decode, max(map(_window, group.prefills))) if group.prefills else decode


def _identity(worker: WorkerState) -> bytes:
    return worker.info.identity.SerializeToString(deterministic=True) if worker.info else b""
