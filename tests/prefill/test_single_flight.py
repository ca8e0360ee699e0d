"""A prefix that several requests have in common is computed once; nobody waits for anybody, and no byte changes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.prefill_jobs import Submitted, WatchedEngine

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.prefill.chunk_step import ChunkStep

BLOCK_SIZE = 32
LIMIT_S = 60.0
NUM_REQUESTS = 8
PREFIX_BLOCKS = 6


@pytest.fixture
def prompts(make_prompt: Any) -> list[list[int]]:
    prefix = make_prompt(PREFIX_BLOCKS * BLOCK_SIZE, seed=1000)  # no other test has blocks of it
    return [prefix + make_prompt(5 + i, seed=i + 1) for i in range(NUM_REQUESTS)]


@pytest.fixture
def count_passes(runtime: Callable[[str], ModelRuntime], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of the runtime's engine, by what they compute."""
    counts: Counter[str] = Counter()
    model = runtime("llama").loaded.model
    hidden = model.hidden

    def counting(ids: torch.Tensor, positions: torch.Tensor, step: Any) -> torch.Tensor:
        if isinstance(step, ChunkStep):
            counts["blocks" if len(ids) % BLOCK_SIZE == 0 else "tails"] += max(len(ids) // BLOCK_SIZE, 1)
        return hidden(ids, positions, step)

    monkeypatch.setattr(model, "hidden", counting)
    return counts


@pytest.mark.parametrize("with_store", [False, True])
async def test_concurrent_requests_compute_a_common_prefix_once(
    with_store: bool,
    runtime: Callable[[str], ModelRuntime],
    serve_workers: Any,
    make_store: Any,
    prompts: list[list[int]],
    count_passes: Counter[str],
) -> None:
    workers = await serve_workers(runtime("llama"))
    alone = [(await workers.generate(prompt, tenant=f"t{i}")).tokens for i, prompt in enumerate(prompts)]
    assert count_passes == {"blocks": NUM_REQUESTS * PREFIX_BLOCKS, "tails": NUM_REQUESTS}  # the control
    count_passes.clear()
    store = await make_store() if with_store else None
    workers = await serve_workers(runtime("llama"), store and store.address)
    tenant = f"together-{with_store}"
    answers = await asyncio.gather(*(workers.generate(prompt, tenant=tenant) for prompt in prompts))
    assert count_passes == {"blocks": PREFIX_BLOCKS, "tails": NUM_REQUESTS}
    assert [answer.tokens for answer in answers] == alone


async def test_tenants_compute_for_themselves(
    runtime: Callable[[str], ModelRuntime], serve_workers: Any, prompts: list[list[int]], count_passes: Counter[str]
) -> None:
    workers = await serve_workers(runtime("llama"))
    answers = await asyncio.gather(*(workers.generate(prompts[0], tenant=tenant) for tenant in ("a", "b", "b")))
    assert count_passes == {"blocks": 2 * PREFIX_BLOCKS, "tails": 3}
    assert answers[0].tokens == answers[1].tokens == answers[2].tokens


def test_the_others_go_on_when_the_first_is_cancelled(
    runtime: Callable[[str], ModelRuntime], prompts: list[list[int]]
) -> None:
    """In the middle of its third pass: what it has finished is used, the rest is computed once."""
    submitted: list[Submitted] = []

    def before_pass(number: int) -> None:
        if number == 2:
            submitted[0].job.cancel()
            submitted.extend(watched.submit(prompt) for prompt in prompts[1:])

    watched = WatchedEngine(runtime("llama"))
    alone = [watched.submit(prompt, tenant=str(i)).tokens() for i, prompt in enumerate(prompts)]
    watched.passes.clear()
    watched.before_pass = before_pass
    submitted.append(watched.make(prompts[0]))
    watched.engine.submit(submitted[0].job)
    while len(submitted) < NUM_REQUESTS:
        time.sleep(0.001)
    assert [one.tokens() for one in submitted[1:]] == alone[1:]
    assert not submitted[0].done.done()
    assert len(watched.passes) == PREFIX_BLOCKS + NUM_REQUESTS - 1
    watched.close()


def test_a_failed_block_is_tried_by_the_next_one(
    runtime: Callable[[str], ModelRuntime], prompts: list[list[int]]
) -> None:
    def before_pass(number: int) -> None:
        if number == 3 and not failed:
            failed.append(number)
            raise RuntimeError("broken")

    failed: list[int] = []
    watched = WatchedEngine(runtime("llama"))
    watched.before_pass = before_pass
    submitted = [watched.make(prompt) for prompt in prompts]
    for one in submitted:
        watched.engine.submit(one.job)
    errors = [one.done.exception(LIMIT_S) for one in submitted]
    assert sum(error is not None for error in errors) == 1
    assert len(watched.passes) == PREFIX_BLOCKS + NUM_REQUESTS - 1
    pools = [one.job.blocks.pool for one, error in zip(submitted, errors, strict=True) if error is None]
    assert all(torch.equal(pool, pools[0]) for pool in pools)
    watched.close()


def test_blocks_are_not_kept_for_their_own_sake(
    runtime: Callable[[str], ModelRuntime], prompts: list[list[int]]
) -> None:
    watched = WatchedEngine(runtime("llama"))
    watched.submit(prompts[0]).tokens()
    watched.submit(prompts[1][:3], tenant="other").tokens()  # the engine has let the first job go
    watched.submit(prompts[2][:3], tenant="other").tokens()
    assert len(watched.engine._shared._holders) == 0
    watched.close()


STEPS = st.lists(
    st.tuples(
        st.integers(0, 4),  # passes before it happens
        st.sampled_from(["submit", "submit", "submit", "cancel"]),
        st.integers(0, 5),  # which prompt, or which job
        st.sampled_from(["a", "b"]),
        st.integers(0, 1),  # priority
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, width=st.sampled_from([1, 4]))
def test_random_interleavings(
    steps: list[tuple[int, str, int, str, int]],
    width: int,
    runtime: Callable[[str], ModelRuntime],
    make_prompt: Any,
) -> None:
    """Requests with prefixes in common come and go before any pass: all that stay end with their own tokens and bytes,
    and no block is computed twice for a tenant."""
    stem = make_prompt(4 * BLOCK_SIZE)
    tree = [stem[: i % 3 * BLOCK_SIZE + BLOCK_SIZE] + make_prompt(20 + 9 * i, seed=i) for i in range(6)]
    watched = WatchedEngine(runtime("llama"), max_pass_blocks=width)
    alone = [watched.submit(prompt, tenant=f"alone-{i}") for i, prompt in enumerate(tree)]
    expected = [one.tokens() for one in alone]
    watched.passes.clear()
    submitted: list[tuple[int, str, Submitted]] = []
    pending = list(steps)
    computed: Counter[tuple[str, int, tuple[int, ...]]] = Counter()

    turn = threading.Lock()

    def act() -> None:
        with turn:
            if not pending:
                return
            _, action, which, tenant, priority = pending.pop(0)
            if action == "submit":
                made = watched.make(tree[which], tenant=tenant, priority=priority)
                submitted.append((which, tenant, made))
                watched.engine.submit(made.job)
            elif submitted:
                submitted[which % len(submitted)][2].job.cancel()

    def before_pass(number: int) -> None:
        while pending and pending[0][0] <= number - last[0]:
            last[0] = number
            act()

    # The first step starts the engine; further ones happen before its passes, and here when it has nothing to do.
    last = [0]
    watched.before_pass = before_pass
    while pending:
        if all(one.job.cancelled or one.done.done() for _, _, one in submitted):
            act()
        else:
            time.sleep(0.001)
    for which, _, one in submitted:
        if one.job.cancelled:
            continue
        assert one.tokens(LIMIT_S) == expected[which]
        reference = alone[which].job.blocks
        assert torch.equal(one.job.blocks.pool, reference.pool)
        assert torch.equal(one.job.blocks.sinks, reference.sinks)
        assert torch.equal(one.job.blocks.tail, reference.tail)
        assert one.finished == list(range(reference.num_blocks))
    watched.close()
    for begin, ids in watched.passes:
        for offset in range(0, len(ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
            computed["", begin + offset, ids[offset : offset + BLOCK_SIZE]] += 1
    tenants = len({tenant for _, tenant, _ in submitted})
    assert max(computed.values(), default=0) <= tenants
