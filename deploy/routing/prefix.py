"""The policy `prefix`: the cheapest workers by what they hold, what waits there, and how fast they are.

One object a gateway. It asks nobody: it knows the workers' last reports and the requests that it placed itself.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from kvferry.deploy.routing.candidates import Candidates, Group
from kvferry.deploy.routing.cost import (
    UNKNOWN_STEP_S,
    DecodeView,
    PrefillCost,
    PrefillView,
    Prompt,
    Speeds,
    answer_cost,
    balance_cost,
    blocks_needed,
    decode_cost,
    prefill_cost,
)
from kvferry.deploy.routing.index import STORE, Holdings, PrefixIndex
from kvferry.deploy.routing.placed import Placed, RunningPrompts
from kvferry.deploy.routing.recent import RecentWork
from kvferry.deploy.routing.reported_work import ReportedWork
from kvferry.deploy.routing.router import Route, RoutedRequest
from kvferry.deploy.routing.worker_state import WorkerState
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.key import block_keys
from kvferry.proto import worker_pb2

W = TypeVar("W", bound=WorkerState)

MAX_EXAMINED = 32
"""Workers of a role that are compared with each other; of more than so many ..."""
NUM_HOLDERS = 8
"""... those that hold the most of the prompt, those that compute one like it, and ..."""
NUM_DRAWN = 8
"""... some drawn at random: gateways that do not know each other then choose different ones."""
NEARLY_SHARE, NEARLY_S = 0.2, 0.001
"""Costs so near to the lowest one are equal, because measured speeds of equal workers differ by as much: of these, the
worker with the least recent work is chosen."""
FREE_PROMPTS = 0.5
"""A prefill worker may have the work of so many such prompts more than its share before that costs anything."""
FREE_ANSWERS = 4
"""A decode worker may have so many requests more than its share before that costs anything."""

DEFAULT_INDEX_BYTES = 64 * 2**20
DEFAULT_TTL_S = 600.0


class PrefixRouter:
    def __init__(
        self,
        *,
        index_bytes: int = DEFAULT_INDEX_BYTES,
        ttl_s: float = DEFAULT_TTL_S,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        """`seed`: of the draws; None: another one each time."""
        self.index = PrefixIndex(capacity_bytes=index_bytes, ttl_s=ttl_s)
        self._clock = clock
        self._random = random.Random(seed)
        self._running = RunningPrompts()
        self._prefill_work = RecentWork()
        self._sent_work = RecentWork()  # this gateway's part of it
        self._reported_work = ReportedWork(self._prefill_work)
        self._decode_work = RecentWork()
        self._members: object = None
        self._addresses: set[str] = set()

    def pick(self, candidates: Candidates[W], request: RoutedRequest) -> Route[W]:
        """See `Router`."""
        now = self._clock()
        if candidates.everyone is not self._members:
            self._learn_members(candidates.everyone, now)
        members = _prefilling(candidates.everyone.groups)
        self._reported_work.read(members, now)
        choices = [self._pick_of(group, request, now) for group in candidates.groups]
        return min(choices, key=lambda choice: choice[0])[1]

    def _pick_of(self, group: Group[W], request: RoutedRequest, now: float) -> tuple[float, Route[W]]:
        info = (group.prefills or group.decodes)[0].info or worker_pb2.WorkerInfo()
        size = info.block_size
        keys = chain_of(info, request)
        num_tokens = len(request.token_ids)
        prompt = Prompt(
            num_tokens=num_tokens,
            num_blocks=(num_tokens - 1) // size if keys else 0,
            block_size=size or num_tokens + request.max_tokens,
            block_bytes=info.block_bytes,
        )
        held = self.index.find(keys[: prompt.num_blocks], now)
        alone = not group.prefills
        prefills = self._shortlist(group, "prefill", held, keys)
        speeds = _known_speeds(prefills)
        costs = [self._prefill_cost(worker, prompt, keys, held, speeds, now) for worker in prefills]
        mean_s = self._prefill_work.mean(now)
        recent_s = self._prefill_work.of((worker.address for worker in prefills), now)
        # Equals are told apart by this gateway's own work: by everyone's, all gateways would choose the same worker.
        sent_s = self._sent_work.of((worker.address for worker in prefills), now)
        totals = [
            cost.total_s
            + balance_cost(
                recent,
                cost.work_s,
                mean_s=mean_s,
                slack_s=FREE_PROMPTS * (worker.load.speeds or speeds).compute_s(0, num_tokens),
            )
            for worker, cost, recent in zip(prefills, costs, recent_s, strict=True)
        ]
        decodes = prefills if alone else self._shortlist(group, "decode", held, keys)
        answers_s = self._decode_work.of((worker.address for worker in decodes), now)
        mean_s = self._decode_work.mean(now)
        decode_totals = [
            self._decode_cost(worker, prompt, held, speeds, request, now)
            + _answer_balance(answer_cost(_step_s(worker, now), request.max_tokens), recent, mean_s)
            for worker, recent in zip(decodes, answers_s, strict=True)
        ]
        if alone:
            totals = [a + b for a, b in zip(totals, decode_totals, strict=True)]
            chosen = self._cheapest(totals, sent_s)
            decode, total = prefills[chosen], totals[chosen]
        else:
            chosen = self._cheapest(totals, sent_s)
            of_decodes = self._cheapest(decode_totals, answers_s)
            decode, total = decodes[of_decodes], totals[chosen] + decode_totals[of_decodes]
        placed = Placed(
            router=self,
            prefill=prefills[chosen],
            decode=None if request.warm else decode,
            keys=keys,
            cost=costs[chosen],
            answer_s=answer_cost(_step_s(decode, now), request.max_tokens),
            pool_blocks=blocks_needed(prompt, request.max_tokens),
        )
        return total, Route(decode, None if prefills[chosen] is decode else prefills[chosen], placed)

    def _prefill_cost(
        self, worker: WorkerState, prompt: Prompt, keys: Sequence[bytes], held: Holdings, speeds: Speeds, now: float
    ) -> PrefillCost:
        load = worker.load
        shared, shared_left_s = self._running.shared(worker.address, keys[: prompt.num_blocks], now)
        view = PrefillView(
            speeds=load.speeds or speeds,
            queue_s=load.queue_s(now),
            num_jobs=load.num_jobs(now),
            held_blocks=held.depth(self.index.slot(f"prefill {worker.address}", now)) if held.steps else 0,
            shared_blocks=shared,
            shared_left_s=shared_left_s,
            store_blocks=held.depth(STORE) if load.prefill.uses_store else 0,
        )
        return prefill_cost(prompt, view)

    def _decode_cost(
        self, worker: WorkerState, prompt: Prompt, held: Holdings, speeds: Speeds, request: RoutedRequest, now: float
    ) -> float:
        load = worker.load
        stats = load.decode(now)
        step_s = _step_s(worker, now)
        fresh = load.is_fresh(now)
        view = DecodeView(
            step_s=step_s,
            num_running=stats.num_running + load.num_requests_sent if fresh else worker.num_outstanding,
            num_waiting=stats.num_waiting,
            free_blocks=stats.pool_blocks - stats.pool_blocks_used - load.num_blocks_sent if fresh else None,
            held_blocks=held.depth(self.index.slot(f"decode {worker.address}", now)) if held.steps else 0,
            store_blocks=held.depth(STORE),
        )
        return decode_cost(prompt, view, max_tokens=request.max_tokens, speeds=speeds)

    def _shortlist(self, group: Group[W], role: str, held: Holdings, keys: Sequence[bytes]) -> Sequence[W]:
        workers = group.decodes if role == "decode" or not group.prefills else group.prefills
        if len(workers) <= MAX_EXAMINED:
            return workers
        by_address = group.by_address
        wanted = [
            address
            for slot in held.deepest(4 * NUM_HOLDERS)
            for kind, _, address in [self.index.place(slot).partition(" ")]
            if kind == role and address in by_address
        ][:NUM_HOLDERS]
        if role == "prefill":
            wanted += [a for a in self._running.addresses(keys, NUM_HOLDERS) if a in by_address]
        chosen = [by_address[address] for address in dict.fromkeys(wanted)]
        return [*chosen, *(w for w in self._random.sample(workers, NUM_DRAWN) if w not in chosen)]

    def _cheapest(self, totals: list[float], recent_s: list[float]) -> int:
        """Position of the worker with the least recent work among those that cost about as little as any."""
        limit = min(totals)
        limit += NEARLY_SHARE * limit + NEARLY_S
        near = [index for index, total in enumerate(totals) if total <= limit]
        if len(near) == 1:
            return near[0]
        self._random.shuffle(near)
        return min(near, key=recent_s.__getitem__)

    def _learn_members(self, everyone: Candidates[W], now: float) -> None:
        self._members = everyone
        decodes = {w.address for group in everyone.groups for w in group.decodes}
        prefills = {w.address for w in _prefilling(everyone.groups)}
        self._decode_work.set_members(sorted(decodes), now)
        self._prefill_work.set_members(sorted(prefills), now)
        self._sent_work.set_members(sorted(prefills), now)
        for address in self._addresses - decodes - prefills:
            self.index.forget_place(f"prefill {address}", now)
            self.index.forget_place(f"decode {address}", now)
        self._addresses = decodes | prefills

    def sent(self, placed: Placed) -> None:
        """A request that this router placed is being sent."""
        now = self._clock()
        self._running.add(placed, now)
        if placed.decode is None:
            return  # it waits for everything else, and nothing waits for it
        placed.ticket = placed.prefill.load.sent(now, placed.cost.work_s)
        placed.decode.load.sent_blocks(now, placed.pool_blocks)
        for work in (self._prefill_work, self._sent_work):
            work.add(placed.prefill.address, now, placed.cost.work_s)
        self._decode_work.add(placed.decode.address, now, placed.answer_s)

    def prefilled(self, placed: Placed, *, ok: bool) -> None:
        """Its prompt is computed, or has failed."""
        now = self._clock()
        self._running.remove(placed)
        if placed.decode is not None:
            placed.prefill.load.answered(placed.ticket)
            self._reported_work.done(placed.prefill.address, placed.cost.work_s)
        if not ok or not placed.keys:
            return
        stats = placed.prefill.load.prefill
        places = [STORE] if stats.uses_store else []
        if placed.decode is not None and placed.decode.address in self._addresses:
            places.append(self.index.slot(f"decode {placed.decode.address}", now))
        if places:
            self.index.record(placed.keys, places, now)
        if stats.cache_blocks and placed.prefill.address in self._addresses:
            kept = placed.keys[: stats.cache_blocks]
            self.index.record(kept, [self.index.slot(f"prefill {placed.prefill.address}", now)], now)


def _prefilling(groups: Iterable[Group[W]]) -> Iterator[W]:
    return (w for group in groups for w in group.prefills or group.decodes)


def chain_of(info: worker_pb2.WorkerInfo, request: RoutedRequest) -> list[bytes]:
    """Keys of a prompt's complete blocks on workers like this one; empty when they do not say their block size."""
    if not info.block_size:
        return []
    namespace = namespace_of(info.identity, tenant=request.tenant, block_size=info.block_size)
    return block_keys(namespace, request.token_ids)


def _known_speeds(workers: Sequence[WorkerState]) -> Speeds:
    """For workers that have not said theirs: the best of the others, so that they are tried."""
    known = [w.load.speeds for w in workers if w.load.speeds is not None]
    return min(known, key=lambda speeds: speeds.token_s) if known else Speeds()


def _answer_balance(answer_s: float, recent_s: float, mean_s: float) -> float:
    return balance_cost(recent_s, answer_s, mean_s=mean_s, slack_s=FREE_ANSWERS * answer_s)


def _step_s(worker: WorkerState, now: float) -> float:
    return worker.load.decode(now).step_seconds or UNKNOWN_STEP_S
