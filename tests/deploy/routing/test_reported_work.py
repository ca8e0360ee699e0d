"""Work that workers report: other gateways' prompts count, estimates give way to what was computed."""

import pytest

from kvferry.deploy.routing.recent import RecentWork
from kvferry.deploy.routing.reported_work import ReportedWork


@pytest.fixture
def known(fleet):
    """(fleet, recent, reported): three prefill workers that have reported nothing yet and were read once."""
    fleet = fleet()
    recent = RecentWork()
    recent.set_members([worker.address for worker in fleet.prefills], fleet.now)
    reported = ReportedWork(recent)
    fleet.report_all(compute_seconds=100.0)
    reported.read(fleet.prefills, fleet.now)
    return fleet, recent, reported


def read(known, *totals):
    fleet, recent, reported = known
    fleet.now += 1.0
    for worker, total in zip(fleet.prefills, totals, strict=True):
        fleet.report(worker, compute_seconds=total)
    reported.read(fleet.prefills, fleet.now)
    return recent.of([worker.address for worker in fleet.prefills], fleet.now)


def test_what_was_before_is_not_counted(known):
    assert read(known, 100.0, 100.0, 100.0) == [0.0, 0.0, 0.0]


def test_other_gateways_prompts_count(known):
    assert read(known, 107.0, 100.0, 102.0) == pytest.approx([7.0, 0.0, 2.0])


def test_estimates_give_way_once_a_report_shows_computing(known):
    fleet, recent, reported = known
    address = fleet.prefills[0].address
    recent.add(address, fleet.now, 5.0)
    assert read(known, 103.0, 100.0, 100.0)[0] == pytest.approx(8.0, rel=0.01)  # it is still running: both count
    reported.done(address, 5.0)
    assert read(known, 103.0, 100.0, 100.0)[0] == pytest.approx(8.0, rel=0.02)  # not in a report yet
    assert read(known, 104.0, 100.0, 100.0)[0] == pytest.approx(4.0, rel=0.03)


def test_never_less_than_nothing(known):
    _, _, reported = known
    reported.done("p1:1", 50.0)
    assert read(known, 100.0, 101.0, 100.0)[1] == 0.0


def test_a_worker_that_starts_again_counts_from_zero(known):
    assert read(known, 3.0, 100.0, 100.0) == pytest.approx([3.0, 0.0, 0.0])


def test_read_at_most_once_a_second(known):
    fleet, recent, reported = known
    fleet.now += 0.5
    fleet.report(fleet.prefills[0], compute_seconds=110.0)
    reported.read(fleet.prefills, fleet.now)
    assert recent.of(["p0:1"], fleet.now) == [0.0]


def test_a_worker_that_left_is_forgotten(known):
    fleet, _recent, reported = known
    reported.done("p2:1", 9.0)
    fleet.now += 1.0
    reported.read(fleet.prefills[:2], fleet.now)
    read(known, 100.0, 100.0, 100.0)  # it is back: its total is where it begins, and nothing is owed
    assert read(known, 100.0, 100.0, 104.0)[2] == pytest.approx(4.0)


def test_gateways_share_out_the_work_of_all(fleet):
    """One gateway keeps a worker busy with its own prompts; the other, which saw none of them, goes elsewhere."""
    fleet = fleet(prefills=2)
    fleet.report_all(compute_seconds=0.0)
    router, candidates = fleet.router(), fleet.candidates
    fleet.serve(router, candidates, fleet.request(range(32)))
    fleet.now += 2.0
    busy, idle = fleet.prefills
    fleet.report(busy, compute_seconds=200.0)
    fleet.report(idle, compute_seconds=10.0)
    chosen = set()
    for seed in range(20):
        fleet.now += 0.01
        chosen.add(router.pick(candidates, fleet.request(range(1000 * seed, 1000 * seed + 32))).prefill.address)
    assert chosen == {idle.address}
