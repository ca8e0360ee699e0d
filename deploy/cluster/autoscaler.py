"""Autoscaling of a deployment: settings and workers' statistics in, counts for the controller out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvferry.deploy.cluster.autoscale import (
    BusyShares,
    Decision,
    DecodeLoad,
    Need,
    PrefillLoad,
    Steps,
    Worker,
    decode_need,
    prefill_need,
)
from kvferry.deploy.cluster.settings import RoleAutoscaleSettings
from kvferry.deploy.settings import Settings
from kvferry.proto import worker_pb2

logger = logging.getLogger(__name__)

WorkerRole = Literal["prefill", "decode"]
ROLES: tuple[WorkerRole, ...] = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class KnownWorker:
    """A worker that the controller wants, in the order of their numbers."""

    name: str
    has_started: bool
    """It has been up, if only once."""


@dataclass(frozen=True, kw_only=True)
class RoleScaling:
    """What `kvferry status` says of a role's number of workers."""

    role: WorkerRole
    wanted: int
    running: int
    is_automatic: bool
    min: int
    """`min`, or the floor that `kvferry scale` has set; like `max` the count itself where that is fixed."""
    max: int
    sees: str = ""
    """The load as it is now."""
    decision: str = ""
    """The last change, and why."""
    decided_s_ago: float = 0.0


class Autoscaler:
    """Decides for the roles that `cluster.autoscale` names; leaves the others alone."""

    def __init__(self, settings: Settings, counts: Mapping[str, int], *, now: float) -> None:
        scaled = settings.cluster.autoscale
        self._settings: dict[WorkerRole, RoleAutoscaleSettings] = {}
        if scaled.prefill is not None:
            self._settings["prefill"] = scaled.prefill
            self._target_tokens = scaled.prefill.target_queued_tokens
            self._busy = BusyShares(scaled.prefill.down_after_s)
        if scaled.decode is not None:
            self._settings["decode"] = scaled.decode
            self._target_usage = scaled.decode.target_usage
            self._max_num_seqs = settings.decode.max_num_seqs
        self._steps = {role: Steps(s.limits, wanted=counts[role], now=now) for role, s in self._settings.items()}
        self._needs: dict[WorkerRole, Need] = {}

    @property
    def roles(self) -> tuple[WorkerRole, ...]:
        return tuple(self._steps)

    def set_floor(self, role: WorkerRole, count: int) -> None:
        """Never fewer from now on. Raises ValueError where that is not within the role's settings."""
        limits = self._settings[role]
        if not limits.min <= count <= limits.max:
            raise ValueError(
                f"{count} {role} workers: autoscaling keeps them between {limits.min} and {limits.max}; choose a "
                f"number within, or change cluster.autoscale.{role} and start anew"
            )
        self._steps[role].floor = count

    def counts(self) -> dict[str, int]:
        return {str(role): steps.last.wanted for role, steps in self._steps.items()}

    def step(
        self,
        now: float,
        workers: Mapping[WorkerRole, Sequence[KnownWorker]],
        stats: Mapping[str, worker_pb2.WorkerStats],
    ) -> dict[str, int]:
        """The counts of the roles that it decides for. `stats`: those that are fresh, by name."""
        for role, steps in self._steps.items():
            before = steps.last
            need = self._needs[role] = self._need(role, now, workers[role], stats)
            after = steps.decide(now, need)
            if after is not before:
                logger.info("%s workers: %s", role, after.reason)
        return self.counts()

    def describe(self, role: WorkerRole, now: float, *, count: int, running: int) -> RoleScaling:
        """`count`: the role's, where it is not decided here."""
        steps = self._steps.get(role)
        if steps is None:
            return RoleScaling(role=role, wanted=count, running=running, is_automatic=False, min=count, max=count)
        last: Decision = steps.last
        need = self._needs.get(role)
        return RoleScaling(
            role=role,
            wanted=last.wanted,
            running=running,
            is_automatic=True,
            min=steps.floor,
            max=self._settings[role].max,
            sees="" if need is None else need.text,
            decision=last.reason,
            decided_s_ago=max(now - last.at, 0.0),
        )

    def _need(
        self,
        role: WorkerRole,
        now: float,
        workers: Sequence[KnownWorker],
        stats: Mapping[str, worker_pb2.WorkerStats],
    ) -> Need:
        if role == "decode":
            return decode_need(
                [Worker(name=w.name, has_started=w.has_started, load=_decode_load(stats.get(w.name))) for w in workers],
                target_usage=self._target_usage,
                max_num_seqs=self._max_num_seqs,
            )
        observed = [
            Worker(name=w.name, has_started=w.has_started, load=_prefill_load(stats.get(w.name))) for w in workers
        ]
        busy = self._busy.update(now, {w.name: w.load.compute_seconds for w in observed if w.load is not None})
        return prefill_need(observed, busy, target_queued_tokens=self._target_tokens)


def _prefill_load(stats: worker_pb2.WorkerStats | None) -> PrefillLoad | None:
    if stats is None or not stats.HasField("prefill"):
        return None
    return PrefillLoad(queued_tokens=stats.prefill.queued_tokens, compute_seconds=stats.prefill.compute_seconds)


def _decode_load(stats: worker_pb2.WorkerStats | None) -> DecodeLoad | None:
    if stats is None or not stats.HasField("decode") or stats.decode.pool_blocks == 0:
        return None
    d = stats.decode
    return DecodeLoad(
        pool_blocks=d.pool_blocks,
        pool_blocks_used=d.pool_blocks_used,
        num_requests=d.num_requests,
        num_waiting=d.num_waiting,
        num_sequences=d.num_running,
    )
