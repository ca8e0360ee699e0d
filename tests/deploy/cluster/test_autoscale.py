"""The rules of autoscaling, on numbers alone: loads, times, and how many workers are wanted."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.deploy.cluster.autoscale import (
    MAX_GAP_S,
    BusyShares,
    DecodeLoad,
    Limits,
    Need,
    PrefillLoad,
    Steps,
    Worker,
    decode_need,
    prefill_need,
)

POOL = 100
SEATS = 16
TARGET = 0.8
UP_S, DOWN_S = 4.0, 60.0


def decode(used: int, *, requests: int = 4, waiting: int = 0, sequences: int | None = None) -> Worker[DecodeLoad]:
    load = DecodeLoad(
        pool_blocks=POOL,
        pool_blocks_used=used,
        num_requests=requests,
        num_waiting=waiting,
        num_sequences=requests - waiting if sequences is None else sequences,
    )
    return Worker(name="decode", has_started=True, load=load)


def prefill(tokens: int) -> Worker[PrefillLoad]:
    return Worker(name="prefill", has_started=True, load=PrefillLoad(queued_tokens=tokens, compute_seconds=0))


UNKNOWN_DECODE: Worker[DecodeLoad] = Worker(name="decode", has_started=True, load=None)
NEW_DECODE: Worker[DecodeLoad] = Worker(name="decode", has_started=False, load=None)
UNKNOWN_PREFILL: Worker[PrefillLoad] = Worker(name="prefill", has_started=True, load=None)
NEW_PREFILL: Worker[PrefillLoad] = Worker(name="prefill", has_started=False, load=None)


@pytest.mark.parametrize(
    "workers, needed, less",
    [
        pytest.param([decode(0, requests=0)], 0, False, id="idle, and nobody would be left"),
        pytest.param([decode(0, requests=0)] * 2, 0, True, id="two idle"),
        pytest.param([decode(80)], 1, False, id="at the target"),
        pytest.param([decode(81)], 2, False, id="above the target"),
        pytest.param([decode(28), decode(27)], 1, True, id="within the lower share of one"),
        pytest.param([decode(28), decode(29)], 1, False, id="above the lower share of one"),
        # 3 hold 90 blocks and 6 wait: 270 blocks in all, at 80 a worker.
        pytest.param([decode(90, requests=9, waiting=6)], 4, False, id="those that wait will need blocks"),
        pytest.param([decode(10, requests=20, waiting=4)], 2, False, id="places for sequences are used up"),
        pytest.param([decode(10, requests=2, waiting=1)] * 2, 3, False, id="all have some that wait"),
        pytest.param(
            [decode(30, requests=2, waiting=1), decode(0, requests=0)], 1, False, id="one waits, no step down"
        ),
        pytest.param([decode(5, requests=6)] * 2, 1, False, id="one would have too many sequences for a step down"),
        pytest.param([decode(0, requests=0), UNKNOWN_DECODE], 1, False, id="an unknown one is needed"),
        pytest.param([UNKNOWN_DECODE, decode(0, requests=0)], 1, False, id="whichever it is"),
        pytest.param([decode(90), UNKNOWN_DECODE], 3, False, id="an unknown one takes no load off"),
        pytest.param([decode(50), NEW_DECODE], 1, True, id="one that never started holds nothing"),
        pytest.param([decode(57), NEW_DECODE], 1, False, id="and is kept when the others are full"),
        pytest.param([NEW_DECODE, NEW_DECODE], 0, False, id="nothing has started"),
        pytest.param([], 0, False, id="none"),
    ],
)
def test_what_decode_load_asks_for(workers: list[Worker[DecodeLoad]], needed: int, less: bool) -> None:
    need = decode_need(workers, target_usage=TARGET, max_num_seqs=SEATS)
    assert (need.workers, need.one_less_is_enough) == (needed, less), need.text


@pytest.mark.parametrize(
    "workers, busy, needed, less",
    [
        pytest.param([prefill(0)], 0.0, 0, False, id="idle, and nobody would be left"),
        pytest.param([prefill(0)] * 2, 0.0, 0, True, id="two idle"),
        pytest.param([prefill(0)] * 2, 0.8, 0, False, id="no queue, because both compute"),
        pytest.param([prefill(0)] * 3, 0.8, 0, True, id="three compute what two can"),
        pytest.param([prefill(0)] * 2, None, 0, False, id="not known how busy"),
        pytest.param([prefill(1000)], 1.0, 1, False, id="at the target"),
        pytest.param([prefill(1001)], 1.0, 2, False, id="above the target"),
        pytest.param([prefill(5000), prefill(0)], 1.0, 5, False, id="by how much"),
        pytest.param([prefill(350), prefill(350)], 0.5, 1, True, id="at the lower share"),
        pytest.param([prefill(350), prefill(351)], 0.5, 1, False, id="above the lower share"),
        pytest.param([prefill(0), UNKNOWN_PREFILL], 0.0, 1, False, id="an unknown one is needed"),
        pytest.param([prefill(0), NEW_PREFILL], 0.0, 0, True, id="one that never started"),
        pytest.param([NEW_PREFILL, prefill(0)], 0.0, 0, False, id="the last one is the only one"),
    ],
)
def test_what_prefill_load_asks_for(
    workers: list[Worker[PrefillLoad]], busy: float | None, needed: int, less: bool
) -> None:
    need = prefill_need(workers, busy, target_queued_tokens=1000)
    assert (need.workers, need.one_less_is_enough) == (needed, less), need.text


def test_busy_shares_need_two_looks_at_every_worker_and_forget() -> None:
    shares = BusyShares(10.0)
    assert shares.update(0.0, {"a": 5.0, "b": 0.0}) is None
    assert shares.update(2.0, {"a": 7.0, "b": 0.5}) == pytest.approx(1.25)
    assert shares.update(4.0, {"a": 7.0, "b": 0.5, "c": 9.0}) is None  # c is new
    assert shares.update(6.0, {"a": 7.0, "b": 0.5, "c": 9.0}) == pytest.approx(2 / 6 + 0.5 / 6)
    assert shares.update(8.0, {"a": 1.0, "b": 0.5}) is None  # a began anew
    for now in range(10, 40, 2):
        assert shares.update(float(now), {"a": 1.0, "b": 0.5}) is not None
    assert shares.update(40.0, {"a": 1.0, "b": 0.5}) == 0.0  # what was long ago is forgotten
    assert shares.update(42.0, {}) == 0.0


def limits(low: int = 1, high: int = 8) -> Limits:
    return Limits(min=low, max=high, up_after_s=UP_S, down_after_s=DOWN_S)


def need(workers: int, *, less: bool = False) -> Need:
    return Need(workers=workers, one_less_is_enough=less, text="as told")


def run(steps: Steps, wants: list[Need], *, begin: float = 0.0, every: float = 2.0) -> list[int]:
    """How many are wanted after each look."""
    return [steps.decide(begin + every * i, want).wanted for i, want in enumerate(wants)]


def test_up_after_a_short_confirmation_by_what_is_needed_at_most_twice() -> None:
    steps = Steps(limits(), wanted=1, now=0)
    assert run(steps, [need(7)] * 10) == [1, 1, 2, 2, 2, 4, 4, 4, 7, 7]
    assert steps.last.reason == "up from 4 to 7: as told"
    assert steps.last.at == 16.0


def test_a_peak_of_one_look_changes_nothing() -> None:
    assert set(run(Steps(limits(), wanted=1, now=0), [need(5), need(1)] * 10)) == {1}


def test_down_by_one_after_each_cool_down() -> None:
    counts = run(Steps(limits(2), wanted=4, now=0), [need(0, less=True)] * 100)
    assert [counts.index(n) for n in (3, 2)] == [30, 61]
    assert counts[-1] == 2


@pytest.mark.parametrize(
    "want", [need(4, less=False), need(5, less=False), need(1, less=False)], ids=["full", "excess", "above the lower"]
)
def test_a_cool_down_begins_again_when_it_is_interrupted(want: Need) -> None:
    spare = [need(0, less=True)] * 25
    assert set(run(Steps(limits(), wanted=4, now=0), [*spare, want, *spare])) == {4}


def test_after_a_pause_nothing_is_proved() -> None:
    steps = Steps(limits(), wanted=2, now=0)
    steps.decide(1.0, need(0, less=True))
    assert steps.decide(1.0 + DOWN_S + MAX_GAP_S, need(0, less=True)).wanted == 2
    steps.decide(100.0, need(8))
    assert steps.decide(100.0 + UP_S + MAX_GAP_S, need(8)).wanted == 2


def test_a_floor_lifts_at_once_and_holds() -> None:
    steps = Steps(limits(), wanted=1, now=0)
    steps.floor = 3
    assert set(run(steps, [need(0, less=True)] * 100)) == {3}
    assert steps.last.reason == "up from 1 to 3: the floor that was asked for"


@pytest.mark.parametrize("wanted, counted", [(0, 2), (3, 3), (9, 5)])
def test_the_start_is_within_the_limits(wanted: int, counted: int) -> None:
    assert Steps(limits(2, 5), wanted=wanted, now=0).last.wanted == counted


decode_workers = st.builds(
    lambda used, waiting, holding: decode(used, requests=waiting + holding, waiting=waiting),
    st.integers(0, POOL),
    st.integers(0, 40),
    st.integers(0, SEATS),
)


@given(workers=st.lists(decode_workers | st.sampled_from([UNKNOWN_DECODE, NEW_DECODE]), max_size=8))
def test_what_runs_fits_those_that_stay(workers: list[Worker[DecodeLoad]]) -> None:
    asked = decode_need(workers, target_usage=TARGET, max_num_seqs=SEATS)
    if asked.one_less_is_enough:
        assert UNKNOWN_DECODE not in workers
        used = sum(w.load.pool_blocks_used for w in workers if w.load)
        assert used < POOL * sum(w.load is not None for w in workers[:-1])


@given(
    wants=st.lists(st.builds(need, st.integers(0, 200), less=st.booleans()), max_size=60),
    low=st.integers(1, 6),
    more=st.integers(0, 6),
    wanted=st.integers(0, 20),
)
def test_bounds_and_steps(wants: list[Need], low: int, more: int, wanted: int) -> None:
    steps = Steps(limits(low, low + more), wanted=wanted, now=0)
    counts = [steps.last.wanted, *run(steps, wants, every=5.0)]
    assert all(low <= count <= low + more for count in counts)
    for before, after in itertools.pairwise(counts):
        assert before - 1 <= after <= 2 * before


def settle(blocks: int, requests: int, *, begin: int, num_looks: int = 900, starts_after: int = 5) -> list[int]:
    """A constant load, spread evenly over the workers that are up, each up some looks after it is wanted."""
    steps = Steps(limits(1, 10), wanted=begin, now=0)
    up, pending_since = begin, 0
    counts = []
    for look in range(num_looks):
        wanted = steps.last.wanted
        if wanted <= up:
            up, pending_since = wanted, look
        elif look - pending_since >= starts_after:
            up = wanted
        each = blocks / requests if requests else 0.0
        places = min(SEATS, math.floor(POOL / each) if each else SEATS)
        here = [requests // up + (i < requests % up) for i in range(up)]
        workers = [
            decode(min(POOL, math.floor(min(n, places) * each)), requests=n, waiting=max(0, n - places)) for n in here
        ]
        workers += [NEW_DECODE] * (wanted - up)
        counts.append(steps.decide(2.0 * look, decode_need(workers, target_usage=TARGET, max_num_seqs=SEATS)).wanted)
    return counts


def changes(counts: list[int]) -> list[int]:
    return [after - before for before, after in itertools.pairwise(counts) if after != before]


@settings(max_examples=60, deadline=None)
@given(requests=st.integers(0, 120), each=st.integers(1, 30), begin=st.integers(1, 10))
def test_a_constant_decode_load_settles_and_does_not_flap(requests: int, each: int, begin: int) -> None:
    counts = settle(requests * each, requests, begin=begin)
    assert len(set(counts[-300:])) == 1
    signs = [step > 0 for step in changes(counts)]
    assert signs == sorted(signs, reverse=True), f"up after down: {counts}"


@settings(max_examples=30, deadline=None)
@given(requests=st.integers(1, 80), more=st.integers(0, 40), begin=st.integers(1, 10))
def test_more_decode_load_never_ends_with_fewer_workers(requests: int, more: int, begin: int) -> None:
    less_load = settle(requests * 10, requests, begin=begin)
    more_load = settle((requests + more) * 10, requests + more, begin=begin)
    assert more_load[-1] >= less_load[-1]


@settings(max_examples=60, deadline=None)
@given(rate=st.floats(0, 9), begin=st.integers(1, 10))
def test_a_constant_prefill_load_settles_and_does_not_flap(rate: float, begin: int) -> None:
    """`rate`: workers' worth of prompts that come, each worker computing 1,000 tokens a second."""
    steps = Steps(limits(1, 10), wanted=begin, now=0)
    busy = BusyShares(DOWN_S)
    queue, done = 0.0, [0.0] * 10
    counts = []
    for look in range(1200):
        wanted = steps.last.wanted
        queue += 2000 * rate
        computed = min(queue, 2000.0 * wanted)
        queue -= computed
        for i in range(wanted):
            done[i] += computed / 1000 / wanted
        names = {f"prefill-{i}": done[i] for i in range(wanted)}
        workers = [prefill(int(queue / wanted)) for _ in range(wanted)]
        asked = prefill_need(workers, busy.update(2.0 * look, names), target_queued_tokens=1000)
        counts.append(steps.decide(2.0 * look, asked).wanted)
    assert len(set(counts[-300:])) == 1
    signs = [step > 0 for step in changes(counts)]
    assert signs == sorted(signs, reverse=True), f"up after down: {counts}"
    assert counts[-1] >= rate


@given(tokens=st.lists(st.integers(0, 20_000), min_size=1, max_size=6), more=st.integers(0, 20_000))
def test_more_queued_tokens_never_ask_for_fewer(tokens: list[int], more: int) -> None:
    now = prefill_need([prefill(n) for n in tokens], 0.5, target_queued_tokens=1000)
    later = prefill_need([prefill(n) for n in [tokens[0] + more, *tokens[1:]]], 0.5, target_queued_tokens=1000)
    assert later.workers >= now.workers
    assert later.one_less_is_enough <= now.one_less_is_enough
