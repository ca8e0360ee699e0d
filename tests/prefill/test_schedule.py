"""The policy alone: priorities, fairness between tenants, turns of a tenant's jobs."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from kvferry.prefill.schedule import Schedule

LONGEST_PASS = 4


@dataclass(eq=False)
class Job:
    tenant: str
    left: int = 1
    priority: int = 0
    warm: bool = False
    longest_pass: int = LONGEST_PASS


def serve(schedule: Schedule[Job], rounds: int = 10**6) -> list[tuple[Job, int]]:
    """Runs passes until nothing is left; the job and the tokens of each."""
    turns = []
    while rounds and (job := schedule.take()) is not None:
        served = min(job.left, job.longest_pass)
        job.left -= served
        if job.left:
            schedule.put_back(job, served=served)
        else:
            schedule.remove(job)
        turns.append((job, served))
        rounds -= 1
    return turns


def test_priorities_then_warm_ones() -> None:
    schedule: Schedule[Job] = Schedule()
    warm, late, usual, urgent = Job("a", warm=True, priority=-9), Job("b", priority=1), Job("a"), Job("b", priority=-1)
    for job in (warm, late, usual, urgent):
        schedule.add(job)
    assert [job for job, _ in serve(schedule)] == [urgent, usual, late, warm]
    assert len(schedule) == 0 and schedule.take() is None


def test_a_tenant_with_many_prompts_does_not_starve_another() -> None:
    schedule: Schedule[Job] = Schedule()
    for _ in range(50):
        schedule.add(Job("many", left=1000))
    serve(schedule, rounds=20)
    single = Job("one", left=40)
    schedule.add(single)
    turns = serve(schedule, rounds=20)
    assert sum(served for job, served in turns if job is single) == 40


def test_a_short_prompt_is_not_stuck_behind_a_long_one() -> None:
    schedule: Schedule[Job] = Schedule()
    long, short = Job("a", left=1000), Job("a", left=2)
    schedule.add(long)
    serve(schedule, rounds=3)
    schedule.add(short)
    assert [job for job, _ in serve(schedule, rounds=2)] == [long, short]


def test_being_away_earns_nothing() -> None:
    schedule: Schedule[Job] = Schedule()
    schedule.add(Job("a", left=4000))
    schedule.add(Job("b", left=4))
    serve(schedule, rounds=500)
    schedule.add(Job("b", left=4000))
    turns = serve(schedule, rounds=100)
    assert abs(sum(s if job.tenant == "a" else -s for job, s in turns)) <= LONGEST_PASS


def test_discard_leaves_the_running_one() -> None:
    schedule: Schedule[Job] = Schedule()
    jobs = [Job("a", left=9), Job("a"), Job("b", priority=3), Job("b", warm=True)]
    for job in jobs:
        schedule.add(job)
    running = schedule.take()
    assert running is jobs[0]
    assert (len(schedule), schedule.num_ready) == (4, 3)
    assert set(schedule.discard(lambda job: True)) == set(jobs[1:])
    assert (list(schedule), schedule.num_ready) == ([running], 0)
    assert schedule.take() is None
    schedule.put_back(running, served=4)
    assert schedule.take() is running


JOBS = st.builds(
    Job,
    tenant=st.sampled_from("abc"),
    left=st.integers(1, 30),
    priority=st.integers(-1, 1),
    warm=st.booleans(),
    longest_pass=st.integers(1, LONGEST_PASS),
)


@given(st.lists(st.one_of(JOBS, st.integers(1, 6), st.just("discard")), max_size=60))
def test_random_loads(steps: list[Job | int | str]) -> None:
    """Jobs come, passes run, jobs are given up. At every pass the best rank goes, everyone gets turns, all end."""
    schedule: Schedule[Job] = Schedule()
    waiting: list[Job] = []
    since: dict[Job, Counter[Job]] = defaultdict(Counter)  # passes of others of tenant and rank since a job's last one

    def rank(job: Job) -> tuple[bool, int]:
        return job.warm, job.priority

    def one_pass() -> bool:
        job = schedule.take()
        assert (job is None) == (not waiting)
        if job is None:
            return False
        assert rank(job) == min(map(rank, waiting))
        for other in waiting:
            if other is not job and (other.tenant, rank(other)) == (job.tenant, rank(job)):
                since[other][job] += 1
                assert since[other][job] == 1
        since[job].clear()
        served = min(job.left, job.longest_pass)
        job.left -= served
        if job.left:
            schedule.put_back(job, served=served)
        else:
            schedule.remove(job)
            waiting.remove(job)
            for counter in since.values():
                counter.pop(job, None)
        return True

    for step in steps:
        if isinstance(step, Job):
            schedule.add(step)
            waiting.append(step)
        elif isinstance(step, int):
            for _ in range(step):
                one_pass()
        elif waiting:
            given_up = waiting.pop(len(waiting) // 2)
            assert schedule.discard(lambda job, given_up=given_up: job is given_up) == [given_up]
        assert len(schedule) == schedule.num_ready == len(waiting)
    while one_pass():
        pass
    assert len(schedule) == 0 and all(job.left == 0 for job in waiting)


@given(
    st.lists(JOBS, min_size=1, max_size=8),
    st.lists(st.lists(st.integers(1, LONGEST_PASS), min_size=1, max_size=4), min_size=2, max_size=4),
    st.integers(1, 60),
)
def test_tenants_that_always_wait_get_the_same(before: list[Job], passes: list[list[int]], rounds: int) -> None:
    """Whatever was there before: while both wait, none is more than a longest pass ahead of another."""
    schedule: Schedule[Job] = Schedule()
    for job in before:
        schedule.add(job)
    serve(schedule)
    for number, lengths in enumerate(passes):
        for longest in lengths:
            schedule.add(Job(f"t{number}", left=10**6, longest_pass=longest))
    served: Counter[str] = Counter({f"t{number}": 0 for number in range(len(passes))})
    for _ in range(rounds):
        for job, tokens in serve(schedule, rounds=1):
            served[job.tenant] += tokens
        assert max(served.values()) - min(served.values()) <= LONGEST_PASS
