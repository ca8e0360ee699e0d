"""A worker's queue between its reports."""

import pytest

from kvferry.deploy.routing.load import STALE_S, WorkerLoad
from kvferry.deploy.routing.recent import HALF_LIFE_S, RecentWork
from kvferry.proto import worker_pb2


def report(queued_s=0.0, jobs=0, **decode):
    return worker_pb2.WorkerStats(
        prefill=worker_pb2.PrefillStats(queued_seconds=queued_s, num_computing=jobs, token_seconds=0.001),
        decode=worker_pb2.DecodeStats(**decode),
    )


class TestLoad:
    def test_drains_and_grows(self):
        load = WorkerLoad()
        load.heard(report(5.0, 2), asked_at=100.0)
        assert load.queue_s(102.0) == pytest.approx(3.0)
        load.sent(102.0, 1.5)
        assert load.queue_s(102.5) == pytest.approx(4.0)
        assert load.num_jobs(102.5) == 2

    def test_a_report_counts_what_was_sent_before_it(self):
        load = WorkerLoad()
        load.heard(report(), asked_at=100.0)
        load.sent(100.5, 1.0)
        late = load.sent(100.95, 2.0)
        load.heard(report(1.5), asked_at=101.0)
        assert load.queue_s(101.0) == pytest.approx(3.5)  # the second may not have been there yet
        load.answered(late)
        load.heard(report(0.5), asked_at=102.0)
        assert load.queue_s(102.0) == pytest.approx(0.5)

    def test_an_old_report_is_not_used(self):
        load = WorkerLoad()
        load.heard(report(500.0, 9, pool_blocks=7), asked_at=100.0)
        ticket = load.sent(101.0, 2.0)
        now = 100.1 + STALE_S
        assert load.queue_s(now) == 2.0
        assert load.num_jobs(now) == 1
        assert load.decode(now).pool_blocks == 0
        load.answered(ticket)
        assert load.queue_s(now) == 0.0
        assert load.speeds is not None

    def test_blocks_sent_count_until_a_report_knows_them(self):
        load = WorkerLoad()
        load.sent_blocks(100.0, 5)
        load.sent_blocks(100.95, 7)
        assert (load.num_blocks_sent, load.num_requests_sent) == (12, 2)
        load.heard(report(), asked_at=101.0)
        assert (load.num_blocks_sent, load.num_requests_sent) == (7, 1)


class TestRecentWork:
    def test_halves(self):
        work = RecentWork()
        work.set_members(["a", "b"], 5e6)
        work.add("a", 5e6, 8.0)
        now = 5e6 + HALF_LIFE_S
        assert work.of("ab", now) == pytest.approx([4.0, 0.0])
        work.add("b", now, 2.0)
        assert work.mean(now) == pytest.approx(3.0)
        work.add("a", now + 2 * HALF_LIFE_S, 1.0)
        assert work.of("a", now + 2 * HALF_LIFE_S) == pytest.approx([2.0])

    def test_newcomers_begin_at_the_mean(self):
        work = RecentWork()
        work.set_members(["a", "b"], 10.0)
        work.add("a", 10.0, 6.0)
        work.set_members(["a", "b", "c"], 10.0)
        assert work.of("abc", 10.0) == [6.0, 0.0, 3.0]
        work.set_members(["b"], 10.0)
        assert work.mean(10.0) == 0.0
        work.add("a", 10.0, 6.0)
        assert work.of("a", 10.0) == [0.0]
