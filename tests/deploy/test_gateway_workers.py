"""Workers that come, go, fail, fall silent or do not fit together."""

import asyncio
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2

from kvferry.deploy.gateway import SERVICE
from kvferry.deploy.routing.router import UNNOTICED, Route
from kvferry.proto import worker_pb2

Code = grpc.StatusCode
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
HANG = 60.0
ROLE = {"decode": ("decode",), "prefill": ("prefill",)}


class TestWorkers:
    async def test_health_follows_the_workers(self, lab):
        prefill = await lab.worker(roles=ROLE["prefill"])
        decode = await lab.worker(lab.text_script("a"), roles=ROLE["decode"])
        await decode.stop()
        gateway = await lab.gateway([decode], [prefill], serving=False)
        assert await lab.health(gateway) == await lab.health(gateway, SERVICE) == NOT_SERVING
        code, details, _ = await lab.refused((await lab.stub(gateway)).Generate(lab.request()))
        assert code == Code.UNAVAILABLE
        assert f"No decode worker is ready: {decode.address} does not answer" in details

        await decode.start()
        await gateway.wait_until_serving(5)
        assert await lab.health(gateway) == await lab.health(gateway, SERVICE) == SERVING
        await prefill.stop()
        await lab.eventually(lambda: "No prefill worker is ready" in gateway.problem)
        assert await lab.health(gateway) == NOT_SERVING
        with pytest.raises(TimeoutError, match="No prefill worker is ready"):
            await gateway.wait_until_serving(0.1)

    async def test_worker_restart(self, lab):
        worker = await lab.worker(lab.text_script("a"))
        gateway = await lab.gateway([worker])
        stub = await lab.stub(gateway)
        for _ in range(3):
            assert [chunk async for chunk in stub.Generate(lab.request())]
            await worker.stop()
            await lab.eventually(lambda: gateway.problem)
            await worker.start()
            await gateway.wait_until_serving(5)
        assert [chunk async for chunk in stub.Generate(lab.request())]

    async def test_identity_mismatch(self, lab):
        prefill = await lab.worker(roles=ROLE["prefill"], identity=lab.identity(b"old"))
        decode = await lab.worker(lab.text_script("a"), roles=ROLE["decode"], identity=lab.identity(b"new"))
        gateway = await lab.gateway([decode], [prefill], serving=False)
        await lab.eventually(lambda: "cannot exchange blocks" in gateway.problem)
        assert await lab.health(gateway) == NOT_SERVING
        code, details, _ = await lab.refused((await lab.stub(gateway)).Generate(lab.request()))
        assert code == Code.UNAVAILABLE
        assert "weights_digest of prefill worker" in details
        assert not decode.requests

        prefill.identity = lab.identity(b"new")
        await gateway.wait_until_serving(5)

    async def test_only_equal_workers_are_paired(self, lab):
        def workers(name):
            return [lab.worker([lab.end(0)], roles=ROLE[role], identity=lab.identity(name)) for role in ROLE]

        decode_a, prefill_a = [await worker for worker in workers(b"a")]
        decode_b, prefill_b = [await worker for worker in workers(b"b")]
        gateway = await lab.gateway([decode_a, decode_b], [prefill_a, prefill_b])
        await lab.eventually(lambda: len(gateway._pool.pairs()) == 2)
        stub = await lab.stub(gateway)
        for _ in range(4):
            assert [chunk async for chunk in stub.Generate(lab.request())]
        assert {sent.prefill_address for sent in decode_a.requests} == {prefill_a.address}
        assert {sent.prefill_address for sent in decode_b.requests} == {prefill_b.address}

    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            pytest.param({"model_name": "other"}, "serves model 'other'", id="model"),
            pytest.param({"identity": None}, "does not say what identity", id="identity"),
            pytest.param({"roles": ("prefill",)}, "has no role decode", id="role"),
        ],
    )
    async def test_wrong_workers_are_not_used(self, lab, fields, sentence):
        gateway = await lab.gateway([await lab.worker(**fields)], serving=False)
        await lab.eventually(lambda: sentence in gateway.problem)

    async def test_a_worker_may_miss_one_poll_and_not_two(self, lab):
        worker = await lab.worker()
        gateway = await lab.gateway([worker])
        worker.describe_delays = [HANG]
        await lab.eventually(lambda: not worker.describe_delays)
        for _ in range(20):
            assert not gateway.problem
            await asyncio.sleep(0.05)
        worker.describe_delays = [HANG] * 2
        await lab.eventually(lambda: "does not answer (DEADLINE_EXCEEDED)" in gateway.problem)
        await gateway.wait_until_serving(5)

    async def test_load_spreads(self, lab):
        decodes = [await lab.worker([5, HANG], roles=ROLE["decode"]) for _ in range(3)]
        prefills = [await lab.worker(roles=ROLE["prefill"]) for _ in range(2)]
        gateway = await lab.gateway(decodes, prefills)
        await lab.eventually(lambda: len(gateway._pool.pairs()) == 6)
        stub = await lab.stub(gateway)
        calls = [stub.Generate(lab.request()) for _ in range(6)]
        for call in calls:
            await lab.first(call)
        assert [worker.num_running for worker in decodes] == [2, 2, 2]
        addresses = [sent.prefill_address for worker in decodes for sent in worker.requests]
        assert sorted(addresses.count(worker.address) for worker in prefills) == [3, 3]
        workers = gateway._pool._workers.values()
        assert sorted(worker.num_outstanding for worker in workers) == [0, 0, 2, 2, 2]  # prefill has done its part
        for call in calls:
            call.cancel()

    async def test_another_router(self, lab):
        class Last:
            def pick(self, candidates, request):
                assert request.token_ids
                (group,) = candidates.groups
                return Route(max(group.decodes, key=lambda worker: worker.address), None, UNNOTICED)

        decodes = [await lab.worker([lab.end(0)]) for _ in range(2)]
        gateway = await lab.gateway(decodes, router=Last())
        await lab.eventually(lambda: len(gateway._pool.pairs()) == 2)
        stub = await lab.stub(gateway)
        for _ in range(4):
            assert [chunk async for chunk in stub.Generate(lab.request())]
        assert len(max(decodes, key=lambda worker: worker.address).requests) == 4

    async def test_workers_can_be_replaced(self, lab):
        old, new = await lab.worker([5, 0.3, lab.end(1)]), await lab.worker([lab.end(0)])
        gateway = await lab.gateway([old])
        stub = await lab.stub(gateway)
        running = stub.Generate(lab.request())
        await lab.first(running)
        gateway.set_workers(decode=[new.address])
        await gateway.wait_until_serving(5)
        assert [chunk async for chunk in stub.Generate(lab.request())]
        assert len(new.requests) == 1
        assert [chunk.finish_reason async for chunk in running] == ["stop"]

    async def test_requests_of_a_removed_worker_end_after_their_grace(self, lab, monkeypatch):
        monkeypatch.setattr("kvferry.deploy.worker_pool._LEAVING_GRACE_S", 0.2)
        worker = await lab.worker([5, HANG])
        gateway = await lab.gateway([worker])
        call = (await lab.stub(gateway)).Generate(lab.request())
        await lab.first(call)
        gateway.set_workers(decode=[])
        async with asyncio.timeout(3):
            code, _, _ = await lab.refused(call)
        assert code == Code.UNAVAILABLE
        await lab.eventually(lambda: worker.num_cancelled == 1)


class TestWorkerFailure:
    @pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.CANCELLED])
    async def test_lost_before_the_first_token_goes_elsewhere(self, lab, code):
        bad = await lab.worker([code])
        good = await lab.worker(lab.text_script("a"))
        gateway = await lab.gateway([bad, good])
        await lab.eventually(lambda: len(gateway._pool.pairs()) == 2)
        stub = await lab.stub(gateway)
        for _ in range(4):
            chunks = [chunk async for chunk in stub.Generate(lab.request())]
            assert [chunk.index for chunk in chunks] == [0, 1]
        assert bad.requests and len(good.requests) == 4
        assert bad.requests[0].sampling.seed in {sent.sampling.seed for sent in good.requests}

    async def test_a_dead_worker_goes_elsewhere_before_the_poll_sees_it(self, lab):
        one, other = [await lab.worker(lab.text_script("a")) for _ in range(2)]
        gateway = await lab.gateway([one, other])
        await lab.eventually(lambda: len(gateway._pool.pairs()) == 2)
        await one.stop()
        stub = await lab.stub(gateway)
        for _ in range(3):
            assert [chunk async for chunk in stub.Generate(lab.request())]

    async def test_a_lost_prefill_worker_is_avoided_too(self, lab):
        decode = await lab.worker([Code.UNAVAILABLE], roles=ROLE["decode"])
        prefills = [await lab.worker(roles=ROLE["prefill"]) for _ in range(2)]
        gateway = await lab.gateway([decode], prefills)
        await lab.eventually(lambda: len(gateway._pool.pairs()) == 2)
        code, _, _ = await lab.refused((await lab.stub(gateway)).Generate(lab.request()))
        assert code == Code.UNAVAILABLE
        assert {sent.prefill_address for sent in decode.requests} == {worker.address for worker in prefills}

    async def test_two_others_are_tried(self, lab):
        workers = [await lab.worker([Code.UNAVAILABLE]) for _ in range(4)]
        gateway = await lab.gateway(workers)
        await lab.eventually(lambda: len(gateway._pool.pairs()) == 4)
        code, details, _ = await lab.refused((await lab.stub(gateway)).Generate(lab.request()))
        assert (code, details) == (Code.UNAVAILABLE, "The worker went away before the first token.")
        assert sum(len(worker.requests) for worker in workers) == 3

    async def test_no_other_worker(self, lab):
        worker = await lab.worker([Code.UNAVAILABLE])
        code, details, _ = await lab.refused((await lab.stub(await lab.gateway([worker]))).Generate(lab.request()))
        assert code == Code.UNAVAILABLE
        assert details == "The worker went away before the first token. No other worker is ready."
        assert len(worker.requests) == 1

    @pytest.mark.parametrize("lost_after", [0, 1, 2, 5])
    async def test_lost_after_a_token_goes_on_elsewhere(self, lab, lost_after):
        """Every token comes once, and the other worker is asked for the same answer."""
        tokens = [5, 6, 7, 8, 9]
        bad = await lab.worker([*tokens[:lost_after], Code.UNAVAILABLE])
        good = await lab.worker([*tokens, lab.end(5)])
        gateway = await lab.gateway([bad, good])
        await lab.eventually(lambda: len(gateway._pool.pairs()) == 2)
        stub = await lab.stub(gateway)
        for _ in range(2):
            chunks = [chunk async for chunk in stub.Generate(lab.request())]
            assert [chunk.index for chunk in chunks] == list(range(6))
            assert [token for chunk in chunks for token in chunk.token_ids] == [*tokens, lab.EOS]
            assert chunks[-1].usage.completion_tokens == 6
        assert bad.requests
        seeds = {sent.sampling.seed for sent in good.requests}
        assert {sent.sampling.seed for sent in bad.requests} <= seeds

    async def test_another_worker_with_another_token_ends_the_answer(self, lab):
        """It must not happen; if it does, nobody gets a mixture of two answers."""
        workers = [await lab.worker([first, 6, Code.UNAVAILABLE]) for first in (5, 7)]
        gateway = await lab.gateway(workers)
        await lab.eventually(lambda: len(gateway._pool.pairs()) == 2)
        call = (await lab.stub(gateway)).Generate(lab.request())
        await lab.first(call)
        await lab.first(call)
        code, details, _ = await lab.refused(call)
        assert code == Code.DATA_LOSS
        assert "another one has another token 0" in details

    async def test_several_answers_go_on_elsewhere(self, lab):
        chunk = worker_pb2.TokenChunk
        script = [chunk(index=i, choice=c, token_id=10 * c + i) for i in range(3) for c in range(2)]
        last = [lab.end(3, token_id=9, choice=c) for c in range(2)]
        bad = await lab.worker([*script[:3], Code.UNAVAILABLE])
        good = await lab.worker([*script, *last])
        gateway = await lab.gateway([bad, good])
        await lab.eventually(lambda: len(gateway._pool.pairs()) == 2)
        stub = await lab.stub(gateway)
        for _ in range(2):
            chunks = [chunk async for chunk in stub.Generate(lab.request(n=2))]
            for choice in range(2):
                mine = [c for c in chunks if c.choice == choice]
                assert [token for c in mine for token in c.token_ids] == [10 * choice + i for i in range(3)] + [9]

    async def test_worker_dies_mid_stream(self, lab):
        worker = await lab.worker([5, 6, HANG])
        gateway = await lab.gateway([worker])
        call = (await lab.stub(gateway)).Generate(lab.request())
        await lab.first(call)
        await lab.first(call)
        await worker.stop()
        async with asyncio.timeout(2):
            code, details, _ = await lab.refused(call)
        assert code == Code.UNAVAILABLE
        assert "after 2 tokens" in details

    @pytest.mark.parametrize(
        ("code", "told", "passes"),
        [
            (Code.INTERNAL, Code.INTERNAL, False),
            (Code.UNKNOWN, Code.INTERNAL, False),
            (Code.UNIMPLEMENTED, Code.INTERNAL, False),
            (Code.DATA_LOSS, Code.DATA_LOSS, False),
            (Code.FAILED_PRECONDITION, Code.UNAVAILABLE, True),
            (Code.INVALID_ARGUMENT, Code.INVALID_ARGUMENT, True),
            (Code.DEADLINE_EXCEEDED, Code.DEADLINE_EXCEEDED, False),
        ],
    )
    async def test_worker_errors(self, lab, code, told, passes):
        worker = await lab.worker([code], details="these details")
        got, details, _ = await lab.refused((await lab.stub(await lab.gateway([worker]))).Generate(lab.request()))
        assert got == told
        assert ("these details" in details) == passes
        assert len(worker.requests) == 1


class TestSilence:
    """No connection is closed; only keepalive can notice."""

    async def test_worker_falls_silent(self, lab):
        worker = await lab.worker([5, 6, HANG])
        wire = await lab.wire(worker.port)
        gateway = await lab.gateway([wire.address])
        call = (await lab.stub(gateway)).Generate(lab.request())
        await lab.first(call)
        wire.cut()
        started = time.monotonic()
        code, _, _ = await lab.refused(call)
        assert code == Code.UNAVAILABLE
        assert time.monotonic() - started < 5
        assert gateway.problem

    async def test_client_falls_silent(self, lab):
        worker = await lab.worker([5, HANG])
        gateway = await lab.gateway([worker])
        wire = await lab.wire(gateway.port)
        call = (await lab.stub(wire)).Generate(lab.request())
        await lab.first(call)
        wire.cut()
        await lab.eventually(lambda: worker.num_cancelled == 1, 5)
        call.cancel()
