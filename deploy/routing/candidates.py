"""The workers that may serve together: groups instead of a list of all pairs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from kvferry.deploy.routing.worker_state import WorkerState
from kvferry.kvstore.identity import unreadable_because
from kvferry.proto import worker_pb2

W = TypeVar("W", bound=WorkerState)


@dataclass(frozen=True, eq=False)
class Group(Generic[W]):
    """Any of `decodes` with any of `prefills`; without prefills, each decode worker prefills by itself.

    Prefill workers of a group are of one identity, so their blocks have the same keys. A decode worker is in the group
    of every identity whose blocks it can read.
    """

    decodes: tuple[W, ...]
    prefills: tuple[W, ...]

    @cached_property
    def by_address(self) -> dict[str, W]:
        return {worker.address: worker for worker in (*self.decodes, *self.prefills)}


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
        """Groups usable workers by prefill workers' identity. Without `has_prefills`, decode workers with the role
        prefill do both."""
        groups = []
        if not has_prefills:
            alone = tuple(w for w in decodes if w.has_role("prefill"))
            groups = [Group(alone, ())] if alone else []
        else:
            by_identity: dict[bytes, list[W]] = {}
            for worker in prefills:
                by_identity.setdefault(_identity(worker).SerializeToString(deterministic=True), []).append(worker)
            for makers in by_identity.values():
                made = _identity(makers[0])
                readers = tuple(w for w in decodes if not unreadable_because(_identity(w), made))
                if readers:
                    groups.append(Group(readers, tuple(makers)))
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

    def of_classes(self, decode: bytes, prefill: bytes) -> Candidates[W]:
        """Only workers of these numerics classes, which give the same tokens bit for bit; all where there are none.
        `prefill`: the decode worker's where it prefills by itself."""
        groups = []
        for group in self.groups:
            decodes = tuple(w for w in group.decodes if numerics_class(w) == decode)
            prefills = tuple(w for w in group.prefills if numerics_class(w) == prefill)
            if decodes and (prefills or (not group.prefills and decode == prefill)):
                groups.append(Group(decodes, prefills))
        return Candidates(groups, everyone=self.everyone) if groups else self

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


def numerics_class(worker: WorkerState) -> bytes:
    """Empty while the worker is not usable."""
    return _identity(worker).numerics_class


def _identity(worker: WorkerState) -> worker_pb2.ModelIdentity:
    return worker.info.identity if worker.info else worker_pb2.ModelIdentity()
