"""Estimates of speeds, fed with simulated measurements."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.prefill.speed import ComputeSpeed, LinkSpeed, TwoPartCost

FACTORS = st.floats(1e-7, 1e2)


@given(FACTORS, FACTORS, FACTORS, st.floats(0, 1e6), st.floats(0, 1e6))
def test_the_first_measurement_counts_alone(a: float, b: float, seconds: float, x: float, y: float) -> None:
    """On its own line, where one part is the whole."""
    for point in ((max(x, 1.0), 0.0), (0.0, max(y, 1.0))):
        cost = TwoPartCost(a, b)
        cost.measure(*point, seconds)
        assert cost.seconds(*point) == pytest.approx(seconds, rel=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1e7), st.floats(0, 1e7), st.floats(0, 1e5)), max_size=30))
def test_factors_stay_positive_and_finite(measurements: list[tuple[float, float, float]]) -> None:
    cost = TwoPartCost(1e-3, 1e-6)
    for x, y, seconds in measurements:
        cost.measure(x, y, seconds)
    assert 0 < cost.first < float("inf") and 0 < cost.second < float("inf")


@pytest.mark.parametrize("per_token", [2e-5, 1e-3])
@pytest.mark.parametrize("context_of_double_cost", [500, 4096, 50_000])
def test_compute_speed_is_learned_by_position(per_token: float, context_of_double_cost: int) -> None:
    """Simulated passes of 128 tokens with 10 % of noise: within a quarter, from the first to the last block."""
    dice = random.Random(1)
    speed = ComputeSpeed()

    def true(begin: int, end: int) -> float:
        return per_token * (end - begin) * (1 + (begin + end) / 2 / context_of_double_cost)

    for _ in range(20):
        for begin in range(0, dice.choice([512, 4096, 8192]), 128):
            speed.measure(begin, begin + 128, true(begin, begin + 128) * dice.gauss(1, 0.1))
    for span in ((0, 128), (0, 4096), (4096, 8192), (0, 8192)):
        assert speed.seconds(*span) == pytest.approx(true(*span), rel=0.25)


@pytest.mark.parametrize("bytes_per_s", [1e5, 1.25e7, 5e9])
def test_link_speed_follows_a_change(bytes_per_s: float) -> None:
    """Simulated fetches: after eight, from a gigabyte a second to any other speed, and back."""
    link = LinkSpeed()
    for latency_s, speed in ((1e-3, 1e9), (0.02, bytes_per_s), (1e-3, 1e9)):
        for _ in range(8):
            link.measure_first(100_000, latency_s + 1e5 / speed)
            link.measure_rest(900_000, 9e5 / speed)
        assert link.seconds(1e6) == pytest.approx(latency_s + 1e6 / speed, rel=0.3)


def test_one_pause_is_not_a_speed() -> None:
    speed = ComputeSpeed()
    for _ in range(20):
        speed.measure(0, 128, 0.1)
    speed.measure(0, 128, 60.0)
    assert speed.seconds(0, 128) < 0.2


def test_a_lookup_is_measured() -> None:
    link = LinkSpeed()
    link.measure_lookup(0.05)
    assert link.lookup_s == pytest.approx(0.05)
    link.measure_lookup(0.0)
    assert 0 < link.lookup_s < 0.05
