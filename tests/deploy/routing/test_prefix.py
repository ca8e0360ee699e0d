"""Choices of the policy `prefix`."""

import random
from collections import Counter

import pytest

from kvferry.deploy.routing.candidates import Candidates
from kvferry.deploy.routing.policies import POLICIES, make_router


def tokens(seed, count):
    return random.Random(seed).choices(range(1000), k=count)


class TestAffinity:
    def test_a_running_prompt_draws_its_like(self, fleet):
        """What is being computed is not computed at a second place."""
        fleet = fleet()
        fleet.report_all()
        router, candidates, document = fleet.router(), fleet.candidates, tokens(1, 320)
        first = router.pick(candidates, fleet.request([*document, 1]))
        with first.prefilling():
            for question in range(2, 5):
                again = router.pick(candidates, fleet.request([*document, question]))
                assert again.prefill is first.prefill
            other = router.pick(candidates, fleet.request(tokens(2, 320)))
            assert other.prefill is not first.prefill

    def test_store_makes_workers_equal_but_not_pools(self, fleet):
        """Prefill workers without a cache fetch, so any of them will do; the decode worker that has the blocks wins."""
        fleet = fleet()
        fleet.report_all(fetch_bytes_per_second=1e5)
        router, candidates, document = fleet.router(), fleet.candidates, tokens(1, 160)
        routes = [fleet.serve(router, candidates, fleet.request([*document, i])) for i in range(4)]
        assert len({route.prefill.address for route in routes}) == 3
        assert len({route.decode.address for route in routes}) == 1

    def test_own_cache_draws(self, fleet):
        """Three documents, four questions each: each document stays where it was computed, each worker gets one."""
        fleet = fleet()
        fleet.report_all(cache_blocks=100, fetch_bytes_per_second=2e4)  # a block: 50 ms to fetch, 160 ms to compute
        router, candidates = fleet.router(), fleet.candidates
        places = {document: set() for document in range(3)}
        for question in range(4):
            for document, addresses in places.items():
                request = fleet.request([*tokens(document, 160), question])
                addresses.add(fleet.serve(router, candidates, request).prefill.address)
        assert all(len(addresses) == 1 for addresses in places.values())
        assert len(set.union(*places.values())) == 3

    def test_a_long_queue_is_left(self, fleet):
        fleet = fleet()
        fleet.report_all(cache_blocks=100)
        router, candidates, document = fleet.router(), fleet.candidates, tokens(1, 160)
        first = fleet.serve(router, candidates, fleet.request([*document, 1])).prefill
        fleet.report(first, cache_blocks=100, queued_seconds=60.0, num_computing=60)
        assert router.pick(candidates, fleet.request([*document, 2])).prefill is not first

    def test_full_pool_is_avoided(self, fleet):
        fleet = fleet()
        fleet.report_all()
        full, other = fleet.decodes
        fleet.report(full, decode={"pool_blocks": 100, "pool_blocks_used": 99})
        route = fleet.router().pick(fleet.candidates, fleet.request(tokens(1, 160)))
        assert route.decode is other

    def test_failed_prompts_teach_nothing(self, fleet):
        fleet = fleet()
        fleet.report_all()
        router, candidates = fleet.router(), fleet.candidates
        with pytest.raises(ConnectionError), router.pick(candidates, fleet.request(tokens(1, 160))).prefilling():
            raise ConnectionError
        assert len(router.index) == 0
        assert sum(w.load.queue_s(fleet.now + 100) for w in fleet.prefills) == 0.0

    def test_worker_that_prefills_by_itself(self, fleet):
        fleet = fleet(alone=True)
        fleet.report_all(fetch_bytes_per_second=1e4)
        router, candidates, document = fleet.router(), fleet.candidates, tokens(1, 160)
        routes = [fleet.serve(router, candidates, fleet.request([*document, i])) for i in range(3)]
        assert {route.prefill for route in routes} == {None}
        assert len({route.decode.address for route in routes}) == 1

    def test_workers_of_unknown_speed_are_tried(self, fleet):
        fleet = fleet()
        for worker in fleet.prefills[:2]:
            fleet.report(worker)
        chosen = Counter(
            fleet.serve(router, fleet.candidates, fleet.request(tokens(i, 320))).prefill.address
            for router in [fleet.router()]
            for i in range(30)
        )
        assert min(chosen.values()) >= 8 and len(chosen) == 3


class TestHotPrefix:
    @pytest.mark.parametrize("seconds_between", [0.0, 0.05, 5.0])
    @pytest.mark.parametrize("cache_blocks", [0, 1000])
    def test_no_worker_above_one_and_a_half_times_the_mean(self, fleet, seconds_between, cache_blocks):
        """One prefix for all requests, at rates from a burst to an idle system: work and requests are shared out."""
        fleet = fleet(prefills=3, decodes=2)
        router, document = fleet.router(), tokens(1, 320)
        fleet.report_all(cache_blocks=cache_blocks)
        candidates = fleet.candidates
        work, answers = Counter(), Counter()
        for number in range(400):
            if number % 20 == 0:
                fleet.report_all(cache_blocks=cache_blocks)
            fleet.now += seconds_between
            route = fleet.serve(router, candidates, fleet.request([*document, number, *range(15)]))
            work[route.prefill.address] += route.notice.cost.work_s
            answers[route.decode.address] += 1
        assert max(work.values()) <= 1.5 * sum(work.values()) / 3
        assert max(answers.values()) <= 1.5 * sum(answers.values()) / 2

    def test_several_gateways_that_know_nothing_of_each_other(self, fleet):
        fleet = fleet(prefills=8, decodes=4)
        fleet.report_all(cache_blocks=1000)
        document, work = tokens(1, 320), Counter()
        routers = [fleet.router() for _ in range(3)]
        for number in range(600):
            router = routers[number % 3]
            route = fleet.serve(router, fleet.candidates, fleet.request([*document, number, *range(15)]))
            work[route.prefill.address] += route.notice.cost.work_s
        assert max(work.values()) <= 1.5 * sum(work.values()) / 8


class TestTenants:
    def test_another_tenants_blocks_are_not_found(self, fleet):
        """Its prompt goes where an unknown one would go, whatever the first tenant has asked."""
        document = tokens(1, 160)
        fleets = [fleet(), fleet()]
        chosen = []
        for one, told in zip(fleets, (document, tokens(9, 160)), strict=True):
            one.report_all(cache_blocks=100)
            router = one.router()
            for i in range(3):
                one.serve(router, one.candidates, one.request([*told, i], tenant="a"))
            route = router.pick(one.candidates, one.request([*document, 7], tenant="b"))
            chosen.append((route.prefill.address, route.decode.address, route.notice.cost))
        assert chosen[0] == chosen[1]

    def test_index_has_no_tokens(self, fleet):
        fleet = fleet()
        fleet.report_all()
        router = fleet.router()
        fleet.serve(router, fleet.candidates, fleet.request([77] * 160))
        assert all(type(key) is bytes and len(key) == 16 for key in router.index._entries)


class TestProperties:
    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize("policy", POLICIES)
    def test_only_usable_workers(self, fleet, policy, seed):
        rng = random.Random(seed)
        fleet = fleet(prefills=rng.randint(1, 5), decodes=rng.randint(1, 5), alone=rng.random() < 0.3)
        router = make_router(policy)
        small = rng.sample(fleet.decodes, rng.randint(0, len(fleet.decodes) - 1))
        for worker in small:
            worker.info.max_model_len = 50
        for _ in range(40):
            prompt = tokens(rng.randint(0, 3), rng.randint(1, 100))
            everyone = [*fleet.prefills, *fleet.decodes]
            failed = rng.sample(everyone, rng.randint(0, min(2, len(everyone))))
            usable = fleet.candidates.without(failed).with_room(len(prompt) + 8)
            if not usable:
                continue
            route = router.pick(usable, fleet.request(prompt))
            group = next(g for g in usable.groups if route.decode in g.decodes)
            assert route.prefill in group.prefills if group.prefills else route.prefill is None
            assert route.decode not in small or len(prompt) + 8 <= 50
            assert not (route.decode in failed and (route.prefill is None or route.prefill in failed))
            with route.prefilling():
                pass

    def test_same_state_same_choice(self, fleet):
        def run():
            one = fleet(prefills=100, decodes=80)
            one.report_all(cache_blocks=50)
            router, candidates, chosen = one.router(), one.candidates, []
            for i in range(60):
                one.now += 0.1
                route = one.serve(router, candidates, one.request(tokens(i % 7, 200)))
                chosen.append((route.prefill.address, route.decode.address))
            return chosen

        assert run() == run()

    def test_index_is_bounded(self, fleet):
        fleet = fleet()
        fleet.report_all()
        router = fleet.router(index_bytes=20_000)
        for i in range(50):
            fleet.serve(router, fleet.candidates, fleet.request(tokens(i, 320)))
        assert 0 < router.index.num_bytes <= 20_000
        assert len(router._running) == 0
        assert all(not w.load._waiting for w in fleet.prefills)

    def test_members_leave_and_come_back_empty(self, fleet):
        fleet = fleet(prefills=2, decodes=1)
        fleet.report_all(cache_blocks=100, fetch_bytes_per_second=2e4)
        router, document = fleet.router(), tokens(1, 160)
        held = fleet.serve(router, fleet.candidates, fleet.request([*document, 1]))
        everyone = fleet.candidates
        # Left out of one choice, a worker is still a member and keeps what it holds.
        router.pick(everyone.without([held.prefill]), fleet.request([*document, 2]))
        assert router.pick(everyone, fleet.request([*document, 3])).notice.cost.latency_s < 0.2
        rest = Candidates.of(fleet.decodes, [w for w in fleet.prefills if w is not held.prefill], has_prefills=True)
        router.pick(rest, fleet.request([*document, 4]))
        again = router.pick(fleet.candidates, fleet.request([*document, 5]))
        assert again.notice.cost.latency_s > 0.2  # fetched: nobody has it in memory any more
