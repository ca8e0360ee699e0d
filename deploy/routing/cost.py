"""What a request costs on a worker, in seconds. Arithmetic only: no clock, no state.

docs/routing.md says what the terms mean.
"""

from __future__ import annotations

from dataclasses import dataclass

WORK_WEIGHT = 1.0
"""A second of a worker's time costs the request a second, and whoever comes after it this many more."""
BALANCE_SHARE = 1.25
"""A worker's recent work may be so many times the mean ..."""
BALANCE_PRICE = 4.0
"""... and each second over it costs so many: then a cached prefix is not worth it any more."""
ANSWER_TOKENS = 128
"""Longer answers count as so long: how long they really get is not known."""
UNKNOWN_TOKEN_S = 1e-3
UNKNOWN_STEP_S = 0.02
UNKNOWN_BYTES_PER_S = 1e9


@dataclass(frozen=True, slots=True)
class Prompt:
    """Of a request; blocks are complete ones, all but the last token's."""

    num_tokens: int
    num_blocks: int
    block_size: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of a prefill worker and its way to the store."""

    token_s: float = UNKNOWN_TOKEN_S
    context_token_s: float = 0.0
    """More, for each token that a token attends to."""
    lookup_s: float = 0.0
    fetch_latency_s: float = 0.0
    fetch_bytes_per_s: float = UNKNOWN_BYTES_PER_S

    def compute_s(self, begin: int, end: int) -> float:
        """Of tokens [begin, end) of a prompt."""
        return (end - begin) * (self.token_s + self.context_token_s * (begin + end) / 2)

    def fetch_s(self, num_bytes: int) -> float:
        return self.fetch_latency_s + num_bytes / self.fetch_bytes_per_s if num_bytes else 0.0


@dataclass(frozen=True, slots=True)
class PrefillView:
    """A prefill worker, for one prompt."""

    speeds: Speeds
    queue_s: float
    num_jobs: int
    held_blocks: int = 0
    """From the start, in the worker's own memory."""
    shared_blocks: int = 0
    """From the start, that a request which is there now has, or computes."""
    shared_left_s: float = 0.0
    """Until that request has computed them."""
    store_blocks: int = 0
    """From the start, that it could fetch."""


@dataclass(frozen=True, slots=True)
class PrefillCost:
    latency_s: float
    """Until the first token."""
    work_s: float
    """Of the worker's computing."""

    @property
    def total_s(self) -> float:
        return self.latency_s + WORK_WEIGHT * self.work_s


def prefill_cost(prompt: Prompt, view: PrefillView) -> PrefillCost:
    """What is held costs nothing, what the store has is fetched or computed, whatever is faster, and the rest is
    computed. Prompts take turns: one waits for as much of others as it computes itself."""
    size, speeds = prompt.block_size, view.speeds
    held = min(max(view.held_blocks, view.shared_blocks), prompt.num_blocks)
    stored = min(max(view.store_blocks, held), prompt.num_blocks)
    fetch_s = speeds.fetch_s((stored - held) * prompt.block_bytes)
    if fetch_s > speeds.compute_s(held * size, stored * size):
        stored, fetch_s = held, 0.0
    shared_left_s = view.shared_left_s if view.shared_blocks > view.held_blocks else 0.0
    work_s = speeds.compute_s(stored * size, prompt.num_tokens)
    wait_s = min(view.queue_s, shared_left_s + view.num_jobs * work_s)
    return PrefillCost(speeds.lookup_s + fetch_s + max(wait_s, shared_left_s) + work_s, work_s)


@dataclass(frozen=True, slots=True)
class DecodeView:
    """A decode worker, for one request."""

    step_s: float
    num_running: int
    num_waiting: int
    free_blocks: int | None
    """Of its pool; None: not known."""
    held_blocks: int = 0
    """From the start, in its pool."""
    store_blocks: int = 0
    """From the start, that come from the store and not from prefill."""


def decode_cost(prompt: Prompt, view: DecodeView, *, max_tokens: int, speeds: Speeds) -> float:
    """The blocks that it must fetch, the wait for a place, and what the answer takes beside those that run."""
    held = min(view.held_blocks, prompt.num_blocks)
    fetch_s = speeds.fetch_s(max(min(view.store_blocks, prompt.num_blocks) - held, 0) * prompt.block_bytes)
    answer_s = answer_cost(view.step_s, max_tokens)
    needed = blocks_needed(prompt, max_tokens) - held
    short = 0.0
    if view.free_blocks is not None and needed > 0:
        short = min(max(needed - view.free_blocks, 0) / needed, 1.0)
    beside = answer_s * view.num_running / (view.num_running + 1)
    return fetch_s + beside + (view.num_waiting + short) * answer_s


def answer_cost(step_s: float, max_tokens: int) -> float:
    return step_s * min(max_tokens, ANSWER_TOKENS)


def blocks_needed(prompt: Prompt, max_tokens: int) -> int:
    """Of the pool, for the prompt and an answer of usual length."""
    return -(-(prompt.num_tokens + min(max_tokens, ANSWER_TOKENS)) // prompt.block_size)


def balance_cost(recent_s: float, work_s: float, *, mean_s: float, slack_s: float) -> float:
    """For a worker that has had `recent_s` of work, where the mean is `mean_s`. `slack_s` is free: one prompt more or
    less is no imbalance."""
    limit_s = BALANCE_SHARE * mean_s + slack_s
    return BALANCE_PRICE * max(recent_s + work_s - limit_s, 0.0)
