"""Workers of `kvferry bench router --simulate`: SIMULATED, no model runs. Queues, caches and speeds in virtual time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.deploy.routing.cost import Speeds
from kvferry.proto import worker_pb2

ASSUMED = Speeds(
    token_s=1 / 10_000,
    context_token_s=1 / 10_000 / 100_000,
    lookup_s=0.001,
    fetch_latency_s=0.002,
    fetch_bytes_per_s=1.25e9,
)
"""Round figures of a model of some 8 billion parameters on a server GPU and a link of 10 Gbit/s: not measured."""


@dataclass(frozen=True, kw_only=True)
class SimulatedSpeeds:
    """Of every worker. Assumed, too: blocks of 512 tokens packed to 3 bits."""

    block_size: int = 512
    block_bytes: int = 12 * 2**20
    prefill: Speeds = ASSUMED
    step_s: float = 0.02
    max_num_seqs: int = 64
    pool_blocks: int = 4096
    cache_blocks: int = 512
    """Of a prefill worker's own memory."""


class LruBlocks:
    """Which blocks a place holds, least recently used first out."""

    def __init__(self, capacity: int | None) -> None:
        self._capacity = capacity
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def depth(self, keys: Sequence[bytes]) -> int:
        """Blocks from the start without a gap."""
        for index, key in enumerate(keys):
            if key not in self._keys:
                return index
        return len(keys)

    def add(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while self._capacity is not None and len(self._keys) > self._capacity:
            self._keys.popitem(last=False)


class SimulatedPrefill:
    """Computes one prompt after the other; fetches beside that. (The real one lets prompts take turns.)"""

    def __init__(self, speeds: SimulatedSpeeds) -> None:
        self._speeds = speeds
        self.memory = LruBlocks(speeds.cache_blocks)
        self._computing: list[tuple[float, Sequence[bytes]]] = []  # (ready at, blocks)
        self.busy_until = 0.0
        self.work_s = 0.0
        self._reported_s = 0.0
        self.num_requests = 0
        self.tokens = {"own": 0, "store": 0, "computed": 0}

    def prefill(self, now: float, keys: Sequence[bytes], num_tokens: int, store: LruBlocks) -> float:
        """When the first token is there."""
        self._settle(now)
        speeds, size = self._speeds.prefill, self._speeds.block_size
        wanted = keys[: (num_tokens - 1) // size]
        held = self.memory.depth(wanted)
        shared, shared_at = held, now
        for ready_at, others in self._computing:
            depth = next((i for i, (a, b) in enumerate(zip(others, wanted, strict=False)) if a != b), None)
            depth = min(len(others), len(wanted)) if depth is None else depth
            if depth > shared:
                shared, shared_at = depth, ready_at
        stored = max(store.depth(wanted), shared)
        fetch_s = speeds.fetch_s((stored - shared) * self._speeds.block_bytes)
        if fetch_s > speeds.compute_s(shared * size, stored * size):
            stored, fetch_s = shared, 0.0
        compute_s = speeds.compute_s(stored * size, num_tokens)
        begins = max(now + speeds.lookup_s + fetch_s, shared_at, self.busy_until)
        self.busy_until = begins + compute_s
        self.work_s += compute_s
        self.num_requests += 1
        self._computing.append((self.busy_until, keys))
        self.tokens["own"] += shared * size
        self.tokens["store"] += (stored - shared) * size
        self.tokens["computed"] += num_tokens - stored * size
        return self.busy_until

    def stats(self, now: float) -> worker_pb2.WorkerStats:
        self._settle(now)
        speeds = self._speeds.prefill
        # Of what was given, what is computed by now; never less than was reported before.
        self._reported_s = max(self._reported_s, self.work_s - max(self.busy_until - now, 0.0))
        return worker_pb2.WorkerStats(
            prefill=worker_pb2.PrefillStats(
                num_computing=len(self._computing),
                queued_seconds=max(self.busy_until - now, 0.0),
                token_seconds=speeds.token_s,
                context_token_seconds=speeds.context_token_s,
                lookup_seconds=speeds.lookup_s,
                fetch_latency_seconds=speeds.fetch_latency_s,
                fetch_bytes_per_second=speeds.fetch_bytes_per_s,
                uses_store=True,
                cache_blocks=self._speeds.cache_blocks,
                compute_seconds=self._reported_s,
            )
        )

    def _settle(self, now: float) -> None:
        for ready_at, keys in self._computing:
            if ready_at <= now:
                self.memory.add(keys)
        self._computing = [one for one in self._computing if one[0] > now]


class SimulatedDecode:
    """Runs sequences side by side, each token in a step's time; more than it has places for wait in order."""

    def __init__(self, speeds: SimulatedSpeeds) -> None:
        self._speeds = speeds
        self.pool = LruBlocks(speeds.pool_blocks)
        self._ends: list[float] = []  # of those that run or wait
        self.num_tokens = 0
        self.num_held_blocks = 0
        self.num_wanted_blocks = 0

    def decode(self, now: float, keys: Sequence[bytes], output_tokens: int) -> None:
        self._settle(now)
        self.num_held_blocks += self.pool.depth(keys)
        self.num_wanted_blocks += len(keys)
        self.pool.add(keys)
        waiting = len(self._ends) - self._speeds.max_num_seqs
        begins = now if waiting < 0 else max(now, sorted(self._ends)[waiting])
        self._ends.append(begins + output_tokens * self._speeds.step_s)
        self.num_tokens += output_tokens

    def stats(self, now: float) -> worker_pb2.WorkerStats:
        self._settle(now)
        running = min(len(self._ends), self._speeds.max_num_seqs)
        return worker_pb2.WorkerStats(
            decode=worker_pb2.DecodeStats(
                pool_blocks=self._speeds.pool_blocks,
                pool_blocks_used=min(16 * running, self._speeds.pool_blocks),
                num_running=running,
                num_waiting=len(self._ends) - running,
                step_seconds=self._speeds.step_s,
            )
        )

    def _settle(self, now: float) -> None:
        self._ends = [end for end in self._ends if end > now]
