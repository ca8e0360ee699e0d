"""Workers that fall silent, are about to end, or send what belongs to another try: requests go on elsewhere."""

import asyncio

import grpc

from kvferry.proto import worker_pb2
from kvferry.proto.attempts import DRAINING_KEY

Code = grpc.StatusCode
HANG = 60.0
ROLE = {"decode": ("decode",), "prefill": ("prefill",)}


class TestMissedPolls:
    async def test_a_silent_worker_loses_its_requests(self, lab):
        """Its connection is up, and nothing comes: after two missed polls they go on elsewhere."""
        workers = [await lab.worker([5, 6, HANG]) for _ in range(2)]
        gateway = await lab.gateway(workers)
        await lab.eventually(lambda: len(gateway._pool._workers) == 2 and len(gateway._pool.pairs()) >= 2)
        call = (await lab.stub(gateway)).Generate(lab.request())
        assert (await call.read()).index == 0
        silent, other = sorted(workers, key=lambda worker: -worker.num_running)
        silent.describe_delays = [HANG] * 100
        other.script = [5, 6, 7, lab.end(3)]
        assert [(await call.read()).index for _ in range(3)] == [1, 2, 3]
        assert await call.code() == Code.OK
        stats = gateway._gateway.stats()
        assert (stats.num_calls_given_up, stats.num_failovers) == (1, 1)
        await lab.eventually(lambda: silent.num_running == 0)

    async def test_prefill_too_before_the_first_token(self, lab):
        prefills = [await lab.worker(roles=ROLE["prefill"]) for _ in range(2)]
        decodes = [await lab.worker([HANG], roles=ROLE["decode"]) for _ in range(2)]
        gateway = await lab.gateway(decodes, prefills)
        await lab.eventually(lambda: len(gateway._pool.pairs()) == 4)
        call = (await lab.stub(gateway)).Generate(lab.request())
        await lab.eventually(lambda: any(worker.requests for worker in decodes))
        used, other = sorted(decodes, key=lambda worker: -worker.num_running)
        other.script = [lab.end(0)]
        [silent] = [worker for worker in prefills if worker.address == used.requests[0].prefill_address]
        silent.describe_delays = [HANG] * 100
        await asyncio.wait_for(lab.drain(call), 20)
        assert await call.code() == Code.OK
        assert gateway._gateway.stats().num_calls_given_up == 1
        assert other.requests[0].prefill_address != silent.address

    async def test_without_another_worker_it_is_waited_for(self, lab):
        worker = await lab.worker([5, 3.0, lab.end(1)])
        gateway = await lab.gateway([worker])
        call = (await lab.stub(gateway)).Generate(lab.request())
        await call.read()
        worker.describe_delays = [HANG] * 3
        await lab.eventually(lambda: gateway.problem)  # the control: the gateway has noticed
        assert (await call.read()).finish_reason == "stop"


class TestAttempts:
    async def test_every_try_has_a_greater_number(self, lab):
        workers = [await lab.worker([5, Code.UNAVAILABLE]), await lab.worker([5, lab.end(1)])]
        gateway = await lab.gateway(workers)
        await lab.eventually(lambda: len(gateway._pool._workers) == 2 and len(gateway._pool.pairs()) >= 2)
        stub = await lab.stub(gateway)
        for _ in range(4):
            assert len([chunk async for chunk in stub.Generate(lab.request(request_id="same"))]) == 2
        lost, good = workers
        assert lost.requests
        numbers = [request.attempt for worker in workers for request in worker.requests]
        assert len(set(numbers)) == len(numbers)
        by_id = {request.attempt for request in good.requests}
        assert all(any(request.attempt < other for other in by_id) for request in lost.requests)

    async def test_tokens_of_another_attempt_are_dropped(self, lab):
        stale = worker_pb2.TokenChunk(index=0, token_id=9, attempt=1)
        worker = await lab.worker([stale, worker_pb2.TokenChunk(index=0, token_id=5), lab.end(1)])
        gateway = await lab.gateway([worker])
        chunks = [chunk async for chunk in (await lab.stub(gateway)).Generate(lab.request())]
        assert [list(chunk.token_ids) for chunk in chunks] == [[5], [lab.EOS]]
        assert gateway._gateway.stats().num_stale_chunks == 1


class TestDraining:
    async def test_a_worker_that_is_about_to_end_is_passed_over(self, lab):
        class Draining(type(await lab.worker())):
            async def Generate(self, request, context):
                self.requests.append(request)
                await context.abort(Code.UNAVAILABLE, "draining", trailing_metadata=((DRAINING_KEY, "1"),))
                yield

        leaving = [Draining() for _ in range(4)]
        for worker in leaving:
            await worker.start()
            lab._stack.push_async_callback(worker.stop)
        good = await lab.worker([lab.end(0)])
        gateway = await lab.gateway([*leaving, good])
        await lab.eventually(lambda: len({pair.decode for pair in gateway._pool.pairs()}) == 5)
        stub = await lab.stub(gateway)
        for _ in range(5):
            assert [chunk async for chunk in stub.Generate(lab.request())]
        assert len(good.requests) == 5
        assert gateway._gateway.stats().num_draining_workers == sum(len(w.requests) for w in leaving) > 3

    async def test_what_a_worker_says_of_itself_takes_it_out(self, lab):
        leaving, good = await lab.worker([5, 0.5, lab.end(1)]), await lab.worker([lab.end(0)])
        gateway = await lab.gateway([leaving])
        stub = await lab.stub(gateway)
        running = stub.Generate(lab.request())
        await lab.first(running)
        leaving.draining = True
        await lab.eventually(lambda: "is about to end" in gateway.problem)
        gateway.set_workers(decode=[leaving.address, good.address])
        await gateway.wait_until_serving(5)
        assert [chunk async for chunk in stub.Generate(lab.request())]
        assert len(leaving.requests) == 1
        assert len([chunk async for chunk in running]) == 1  # what runs there goes on to its end
