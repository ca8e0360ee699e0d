"""The engine with jobs that have ranks, deadlines, several answers, or want blocks only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.prefill_jobs import Submitted, WatchedEngine

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kernels.sampling import SamplingParams
from kvferry.prefill.errors import DeadlinePassed

BLOCK_SIZE = 32
LIMIT_S = 60.0


@pytest.fixture
def watched(runtime: Callable[[str], ModelRuntime]) -> Iterator[WatchedEngine]:
    engine = WatchedEngine(runtime("llama"))
    yield engine
    engine.close()


class Gate:
    """Stops an engine before its first pass until it is opened."""

    def __init__(self, watched: WatchedEngine) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        watched.before_pass = self._stop

    def _stop(self, number: int) -> None:
        self.reached.set()
        if number == 0:
            assert self._open.wait(LIMIT_S)

    def open(self) -> None:
        assert self.reached.wait(LIMIT_S)
        self._open.set()


def order(gate: Gate, *jobs: Submitted) -> list[Submitted]:
    """Opens the gate; the jobs in the order in which they end."""
    ended: list[Submitted] = []
    for job in jobs:
        job.done.add_done_callback(lambda _, job=job: ended.append(job))
    gate.open()
    for job in jobs:
        job.done.exception(LIMIT_S)
    return ended


def test_ranks(watched: WatchedEngine, make_prompt: Any) -> None:
    gate = Gate(watched)
    first = watched.submit(make_prompt(5))
    assert gate.reached.wait(LIMIT_S)
    warm = watched.submit(make_prompt(BLOCK_SIZE, seed=1), warm=True)
    late = watched.submit(make_prompt(40, seed=2), priority=1)
    long = watched.submit(make_prompt(150, seed=3))
    short = watched.submit(make_prompt(9, seed=4))
    urgent = watched.submit(make_prompt(150, seed=5), priority=-1)
    assert order(gate, first, warm, late, long, short, urgent) == [first, urgent, short, long, late, warm]


def test_another_tenant_is_not_starved(watched: WatchedEngine, make_prompt: Any) -> None:
    gate = Gate(watched)
    many = [watched.submit(make_prompt(70, seed=i), tenant="many") for i in range(6)]
    one = watched.submit(make_prompt(70, seed=9), tenant="one")
    assert order(gate, *many, one)[0] is one


def test_a_late_job_is_ended_and_not_computed(watched: WatchedEngine, make_prompt: Any) -> None:
    gate = Gate(watched)
    prompt = make_prompt(5 * BLOCK_SIZE + 3)
    half = watched.submit(prompt, deadline=time.monotonic() + LIMIT_S)
    assert gate.reached.wait(LIMIT_S)
    half.job.deadline = time.monotonic()
    waiting = watched.submit(make_prompt(50, seed=1), deadline=time.monotonic(), priority=7)
    good = watched.submit(make_prompt(50, seed=2), deadline=time.monotonic() + LIMIT_S)
    gate.open()
    for late in (half, waiting):
        assert isinstance(late.done.exception(LIMIT_S), DeadlinePassed)
    assert len(good.tokens()) == 1
    assert half.finished == [0]  # its pass was running
    assert len(watched.passes) == 1 + 2
    assert len(list(watched.engine._schedule)) == 0


def test_a_cancelled_job_goes_at_once_even_when_it_is_never_its_turn(watched: WatchedEngine, make_prompt: Any) -> None:
    gate = Gate(watched)
    running = watched.submit(make_prompt(4 * BLOCK_SIZE))
    waiting = watched.submit(make_prompt(50, seed=1), priority=9)
    assert gate.reached.wait(LIMIT_S)
    waiting.job.cancel()
    held: list[int] = []

    def count(number: int) -> None:
        held.append(len(list(watched.engine._schedule)))

    watched.before_pass = count
    gate._open.set()
    running.tokens()
    assert held == [1, 1, 1]
    assert not waiting.done.done() and waiting.finished == []


def test_each_answer_is_that_of_its_seed(watched: WatchedEngine, make_prompt: Any) -> None:
    prompt = make_prompt(40)
    seed = 2**64 - 3  # answers 3 and later begin again at 0
    several = watched.submit(prompt, sampling=SamplingParams(temperature=1.5, seed=seed, top_logprobs=2), num_answers=6)
    tokens = several.done.result(LIMIT_S)
    assert len(set(several.tokens())) > 1
    for answer, token in enumerate(tokens):
        params = SamplingParams(temperature=1.5, seed=(seed + answer) % 2**64, top_logprobs=2)
        assert watched.submit(prompt, sampling=params).done.result(LIMIT_S) == [token]


def test_warm_packs_the_complete_blocks_and_nothing_else(watched: WatchedEngine, make_prompt: Any) -> None:
    prompt = make_prompt(3 * BLOCK_SIZE + 7)
    logits = watched._runtime.model.logits
    calls: list[int] = []

    def counting(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return logits(hidden)

    watched.logits = counting  # type: ignore[attr-defined]
    warm = watched.submit(prompt[: 3 * BLOCK_SIZE], warm=True)
    assert warm.tokens() == [] and warm.finished == [0, 1, 2] and calls == []
    assert len(watched.passes) == 3
    whole = watched.submit(prompt)
    assert len(whole.tokens()) == 1 and len(calls) == 1
    assert len(watched.passes) == 4  # the tail: the blocks were there
    assert torch.equal(whole.job.blocks.pool, warm.job.blocks.pool)
    assert watched.engine.seconds_left == 0.0


def test_what_is_left_is_estimated(watched: WatchedEngine, make_prompt: Any) -> None:
    watched.submit(make_prompt(50)).tokens()
    gate = Gate(watched)
    watched.passes.clear()
    job = watched.submit(make_prompt(1000, seed=1))
    assert gate.reached.wait(LIMIT_S)
    alone = watched.engine._speed.seconds(0, 1000)
    assert watched.engine.seconds_left == pytest.approx(alone) and alone > 0
    assert watched.engine.seconds_for(0, 32) == pytest.approx(2 * watched.engine._speed.seconds(0, 32))  # takes turns
    assert watched.engine.seconds_for(0, 5000) == pytest.approx(watched.engine._speed.seconds(0, 5000) + alone)
    job.job.cancel()
    gate.open()


def test_a_failing_job_leaves_the_others_alone(watched: WatchedEngine, make_prompt: Any) -> None:
    def fail(number: int) -> None:
        if number == 1:
            watched.passes.append((0, ()))
            raise RuntimeError("broken")

    watched.before_pass = fail
    one = watched.submit(make_prompt(3 * BLOCK_SIZE + 1))
    assert isinstance(one.done.exception(LIMIT_S), RuntimeError)
    assert len(watched.submit(make_prompt(3 * BLOCK_SIZE + 1)).tokens()) == 1
