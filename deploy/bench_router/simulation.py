"""SIMULATED: the real routers over simulated workers, in virtual time. Decision times and state sizes are measured.

Every gateway has a router and a view of its own, polls all workers once a second, and hears nothing of the others.
"""

from __future__ import annotations

import heapq
import itertools
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from kvferry.deploy.bench_router.simulated_worker import LruBlocks, SimulatedDecode, SimulatedPrefill, SimulatedSpeeds
from kvferry.deploy.bench_serve.trace import BLOCK_TOKENS, TraceRow
from kvferry.deploy.routing.candidates import Candidates
from kvferry.deploy.routing.policies import Policy, make_router
from kvferry.deploy.routing.prefix import PrefixRouter, chain_of
from kvferry.deploy.routing.router import RoutedRequest, Router
from kvferry.deploy.routing.worker_state import WorkerState
from kvferry.proto import worker_pb2

POLL_S = 1.0
TENANT = "simulated"
_DIGEST = b"\0" * 32
_IDENTITY = worker_pb2.ModelIdentity(
    weights_digest=_DIGEST, tokenizer_digest=_DIGEST, spec_digest=_DIGEST, numerics_class=_DIGEST
)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    num_prefill: int
    num_decode: int
    num_gateways: int = 1
    seed: int = 0
    speeds: SimulatedSpeeds = field(default_factory=SimulatedSpeeds)


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One policy over one trace. Times of requests are virtual; `decision_s` and `state_bytes` are real."""

    policy: Policy
    ttfts_s: Sequence[float]
    tokens: dict[str, int]
    """Prompt tokens by where they came from: own (memory, or shared with a running prompt), store, computed."""
    prefill_work_s: Sequence[float]
    prefill_requests: Sequence[int]
    decode_tokens: Sequence[int]
    pool_hit_share: float
    """Of the prompts' blocks, in the decode worker's pool."""
    decision_s: Sequence[float]
    """Of each choice, keys included."""
    state_bytes: int
    """Of a gateway's index, by its own upper estimate; the largest of all gateways."""


class _Gateway:
    def __init__(self, router: Router, scenario: Scenario) -> None:
        self.router = router
        self.prefills = [_state(f"prefill-{i}:1", "prefill", scenario) for i in range(scenario.num_prefill)]
        self.decodes = [_state(f"decode-{i}:1", "decode", scenario) for i in range(scenario.num_decode)]
        self.candidates = Candidates.of(self.decodes, self.prefills, has_prefills=True)
        self.number = {w.address: i for ws in (self.prefills, self.decodes) for i, w in enumerate(ws)}


def _state(address: str, role: str, scenario: Scenario) -> WorkerState:
    state = WorkerState(address)
    state.info = worker_pb2.WorkerInfo(
        roles=[role],
        identity=_IDENTITY,
        block_size=scenario.speeds.block_size,
        block_bytes=scenario.speeds.block_bytes,
        max_model_len=2**24,
    )
    return state


class _Clock:
    """Virtual seconds, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._count), action))

    def run(self) -> None:
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()


def simulate(policy: Policy, rows: Sequence[TraceRow], scenario: Scenario) -> Simulated:
    """Serves the trace."""
    return _Simulation(policy, rows, scenario).run()


class _Simulation:
    def __init__(self, policy: Policy, rows: Sequence[TraceRow], scenario: Scenario) -> None:
        self._policy = policy
        self._rows = rows
        self._scenario = scenario
        self._clock = _Clock()
        self._store = LruBlocks(None)
        self._prefills = [SimulatedPrefill(scenario.speeds) for _ in range(scenario.num_prefill)]
        self._decodes = [SimulatedDecode(scenario.speeds) for _ in range(scenario.num_decode)]
        self._gateways = [_Gateway(self._router(i), scenario) for i in range(scenario.num_gateways)]
        self._decision_s: list[float] = []
        self._ttfts_s: list[float] = []
        self._last_s = (rows[-1].timestamp_ms - rows[0].timestamp_ms) / 1000

    def _router(self, number: int) -> Router:
        if self._policy == "prefix":
            return PrefixRouter(clock=lambda: self._clock.now, seed=1000 * self._scenario.seed + number)
        return make_router(self._policy)

    def run(self) -> Simulated:
        for index, row in enumerate(self._rows):
            when = (row.timestamp_ms - self._rows[0].timestamp_ms) / 1000
            gateway = self._gateways[index % len(self._gateways)]
            self._clock.at(when, lambda gateway=gateway, row=row, index=index: self._arrive(gateway, row, index))  # type: ignore[misc]
        for number, gateway in enumerate(self._gateways):
            self._clock.at(POLL_S * number / len(self._gateways), lambda gateway=gateway: self._poll(gateway))  # type: ignore[misc]
        self._clock.run()
        indexes = [g.router.index.num_bytes for g in self._gateways if isinstance(g.router, PrefixRouter)]
        return Simulated(
            policy=self._policy,
            ttfts_s=self._ttfts_s,
            tokens={name: sum(p.tokens[name] for p in self._prefills) for name in ("own", "store", "computed")},
            prefill_work_s=[p.work_s for p in self._prefills],
            prefill_requests=[p.num_requests for p in self._prefills],
            decode_tokens=[d.num_tokens for d in self._decodes],
            pool_hit_share=sum(d.num_held_blocks for d in self._decodes)
            / max(sum(d.num_wanted_blocks for d in self._decodes), 1),
            decision_s=self._decision_s,
            state_bytes=max(indexes, default=0),
        )

    def _poll(self, gateway: _Gateway) -> None:
        now = self._clock.now
        for state, prefill in zip(gateway.prefills, self._prefills, strict=True):
            state.load.heard(prefill.stats(now), asked_at=now)
        for state, decode in zip(gateway.decodes, self._decodes, strict=True):
            state.load.heard(decode.stats(now), asked_at=now)
        if now < self._last_s:
            self._clock.at(now + POLL_S, lambda: self._poll(gateway))

    def _arrive(self, gateway: _Gateway, row: TraceRow, index: int) -> None:
        request = RoutedRequest(tenant=TENANT, token_ids=token_ids_of(row, index), max_tokens=row.output_length)
        started = time.perf_counter()
        route = gateway.router.pick(gateway.candidates, request)
        self._decision_s.append(time.perf_counter() - started)
        assert route.prefill is not None and route.decode.info is not None
        arrived = self._clock.now
        keys = chain_of(route.decode.info, request)
        prefill = self._prefills[gateway.number[route.prefill.address]]
        decode = self._decodes[gateway.number[route.decode.address]]
        prefilling = ExitStack()
        decoding = ExitStack()
        decoding.enter_context(route.decode.in_use())
        prefilling.enter_context(route.prefill.in_use())
        prefilling.enter_context(route.prefilling())
        first_token_at = prefill.prefill(arrived, keys, len(request.token_ids), self._store)

        def first_token() -> None:
            prefilling.close()
            self._store.add(keys)
            self._ttfts_s.append(self._clock.now - arrived)
            decode.decode(self._clock.now, keys, row.output_length)
            self._clock.at(self._clock.now + row.output_length * self._scenario.speeds.step_s, decoding.close)

        self._clock.at(first_token_at, first_token)


def token_ids_of(row: TraceRow, index: int) -> array[int]:
    """A prompt with the row's length and shared beginnings; what the row's ids do not cover is its own."""
    tokens = array("I")
    for hash_id in row.hash_ids:
        tokens.extend(array("I", [hash_id % 2**32]) * BLOCK_TOKENS)
    del tokens[row.input_length :]
    tokens.extend(array("I", [2**31 + index]) * (row.input_length - len(tokens)))
    return tokens
