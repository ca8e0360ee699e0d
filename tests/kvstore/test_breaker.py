"""The breaker against a model, on a clock that the test holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvferry.kvstore.breaker import Breaker, BreakerState


class _Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def _breaker(threshold: int = 2) -> tuple[Breaker, _Clock]:
    clock = _Clock()
    return Breaker(failure_threshold=threshold, cool_down_s=10.0, clock=clock), clock


def test_opens_after_consecutive_failures_only() -> None:
    breaker, _ = _breaker()
    breaker.record_failure()
    breaker.record_success()
    breaker.record_failure()
    assert breaker.allows_call()
    breaker.record_failure()
    assert not breaker.allows_call()
    assert breaker.state is BreakerState.OPEN


def test_one_probe_after_the_cool_down() -> None:
    breaker, clock = _breaker(threshold=1)
    assert not breaker.try_probe(), "closed: nothing to probe"
    breaker.record_failure()
    clock.now += 9.99
    assert not breaker.try_probe()
    clock.now += 0.01
    assert breaker.try_probe()
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.allows_call() and not breaker.try_probe()


def test_failed_probe_waits_a_whole_cool_down_again() -> None:
    breaker, clock = _breaker(threshold=3)
    for _ in range(3):
        breaker.record_failure()
    clock.now += 10.0
    assert breaker.try_probe()
    breaker.record_failure()
    clock.now += 9.99
    assert not breaker.try_probe()
    clock.now += 0.01
    assert breaker.try_probe()
    breaker.record_success()
    assert breaker.allows_call()
    breaker.record_failure()
    assert breaker.allows_call(), "the count starts again after healing"


def test_late_failures_do_not_prolong_the_cool_down() -> None:
    breaker, clock = _breaker(threshold=1)
    breaker.record_failure()
    clock.now += 9.0
    breaker.record_failure()
    clock.now += 1.0
    assert breaker.try_probe()


@given(
    st.integers(1, 4),
    st.lists(st.sampled_from(["success", "failure", "probe", "wait", "wait long"])),
)
def test_model(threshold: int, events: list[str]) -> None:
    breaker, clock = _breaker(threshold)
    failures_in_a_row, is_open, probing, opened_at = 0, False, False, 0.0
    for event in events:
        if event == "success":
            breaker.record_success()
            failures_in_a_row, is_open, probing = 0, False, False
        elif event == "failure":
            breaker.record_failure()
            failures_in_a_row += 1
            if probing or (not is_open and failures_in_a_row >= threshold):
                is_open, probing, opened_at = True, False, clock.now
        elif event == "probe":
            due = is_open and not probing and clock.now >= opened_at + 10.0
            assert breaker.try_probe() is due
            probing = probing or due
        else:
            clock.now += 1.0 if event == "wait" else 10.0
        assert breaker.allows_call() is not is_open
        assert (breaker.state is BreakerState.HALF_OPEN) is probing
