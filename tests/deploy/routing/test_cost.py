"""The cost model against sums done by hand."""

import pytest

from kvferry.deploy.routing.cost import (
    BALANCE_PRICE,
    DecodeView,
    PrefillView,
    Prompt,
    Speeds,
    balance_cost,
    decode_cost,
    prefill_cost,
)

# 10 blocks of 16 tokens and 8 tokens more; a token takes 10 ms, a block of 1000 bytes 1 ms to fetch.
PROMPT = Prompt(num_tokens=168, num_blocks=10, block_size=16, block_bytes=1000)
SPEEDS = Speeds(token_s=0.01, lookup_s=0.002, fetch_latency_s=0.005, fetch_bytes_per_s=1e6)


def view(**fields):
    return PrefillView(**({"speeds": SPEEDS, "queue_s": 0.0, "num_jobs": 0} | fields))


class TestPrefill:
    @pytest.mark.parametrize(
        "fields, latency, work",
        [
            pytest.param({}, 0.002 + 1.68, 1.68, id="nothing anywhere: all is computed"),
            pytest.param({"held_blocks": 10}, 0.002 + 0.08, 0.08, id="all held: the last 8 tokens"),
            pytest.param({"store_blocks": 10}, 0.002 + 0.005 + 0.01 + 0.08, 0.08, id="all in the store: fetched"),
            pytest.param({"held_blocks": 4, "store_blocks": 10}, 0.002 + 0.005 + 0.006 + 0.08, 0.08, id="4 held"),
            pytest.param({"store_blocks": 5}, 0.002 + 0.005 + 0.005 + 0.88, 0.88, id="half of it in the store"),
            pytest.param({"held_blocks": 99}, 0.002 + 0.08, 0.08, id="no more than the prompt has"),
            pytest.param({"queue_s": 3.0, "num_jobs": 1}, 0.002 + 1.68 + 1.68, 1.68, id="takes turns with one job"),
            pytest.param({"queue_s": 0.5, "num_jobs": 1}, 0.002 + 0.5 + 1.68, 1.68, id="with a short job"),
            pytest.param(
                {"queue_s": 9.0, "num_jobs": 3, "held_blocks": 10},
                0.002 + 3 * 0.08 + 0.08,
                0.08,
                id="short beside long",
            ),
            pytest.param(
                {"queue_s": 1.2, "num_jobs": 1, "shared_blocks": 10, "shared_left_s": 1.0},
                0.002 + 1.0 + 0.08 + 0.08,
                0.08,
                id="waits for what another computes",
            ),
            pytest.param(
                {"queue_s": 0.0, "num_jobs": 0, "shared_blocks": 10, "shared_left_s": 1.0, "held_blocks": 10},
                0.002 + 0.08,
                0.08,
                id="what is held need not be waited for",
            ),
        ],
    )
    def test_by_hand(self, fields, latency, work):
        cost = prefill_cost(PROMPT, view(**fields))
        assert cost.latency_s == pytest.approx(latency)
        assert cost.work_s == pytest.approx(work)
        assert cost.total_s == pytest.approx(latency + work)

    def test_slow_store_is_not_fetched_from(self):
        slow = Speeds(token_s=0.01, fetch_latency_s=0.1, fetch_bytes_per_s=1e3)  # a block takes 1 s, computing it 0.16
        cost = prefill_cost(PROMPT, view(speeds=slow, store_blocks=10))
        assert cost.latency_s == cost.work_s == pytest.approx(1.68)

    def test_context_grows(self):
        grows = Speeds(token_s=0.0, context_token_s=1e-4)
        assert grows.compute_s(0, 10) == pytest.approx(1e-4 * 50)
        assert grows.compute_s(10, 20) == pytest.approx(1e-4 * 150)

    def test_hit_is_worth_a_queue_but_not_any(self):
        """A worker with the blocks, behind a queue, against an idle one that computes everything (1.68 s, twice)."""
        idle = prefill_cost(PROMPT, view()).total_s
        for jobs, cheaper in ((1, True), (10, True), (50, False)):
            hit = prefill_cost(PROMPT, view(held_blocks=10, queue_s=100.0, num_jobs=jobs))
            assert (hit.total_s < idle) is cheaper


class TestDecode:
    def cost(self, max_tokens=10, **fields):
        given = {"step_s": 0.01, "num_running": 0, "num_waiting": 0, "free_blocks": 100} | fields
        return decode_cost(PROMPT, DecodeView(**given), max_tokens=max_tokens, speeds=SPEEDS)

    @pytest.mark.parametrize(
        "fields, seconds",
        [
            pytest.param({}, 0.0, id="idle, blocks come from prefill"),
            pytest.param({"store_blocks": 10}, 0.015, id="10 blocks from the store"),
            pytest.param({"store_blocks": 10, "held_blocks": 10}, 0.0, id="10 blocks in the pool"),
            pytest.param({"store_blocks": 10, "held_blocks": 4}, 0.011, id="4 of 10 in the pool"),
            pytest.param({"num_running": 1}, 0.05, id="beside another"),
            pytest.param({"num_waiting": 2}, 0.2, id="behind two"),
            pytest.param({"free_blocks": 6}, 0.05, id="room for 6 of the 12 blocks"),
            pytest.param({"free_blocks": 2, "held_blocks": 10}, 0.0, id="what is held needs no room"),
            pytest.param({"free_blocks": -5}, 0.1, id="less than no room"),
            pytest.param({"free_blocks": None}, 0.0, id="room not known"),
        ],
    )
    def test_by_hand(self, fields, seconds):
        assert self.cost(**fields) == pytest.approx(seconds)

    def test_long_answers_count_as_usual_ones(self):
        assert self.cost(max_tokens=100_000, num_running=1) == self.cost(max_tokens=128, num_running=1)


class TestBalance:
    @pytest.mark.parametrize(
        "recent, work, seconds",
        [(0, 1, 0), (4, 1, 0), (6, 1, 0), (7, 1, BALANCE_PRICE * 1), (10, 2, BALANCE_PRICE * 5)],
    )
    def test_by_hand(self, recent, work, seconds):
        """The mean is 4, so 1.25 * 4 + 2 is free."""
        assert balance_cost(recent, work, mean_s=4.0, slack_s=2.0) == pytest.approx(seconds)
