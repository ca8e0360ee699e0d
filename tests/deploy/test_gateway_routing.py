"""Where a gateway's requests go, with scripted workers over real sockets."""

import asyncio

import pytest

from kvferry.deploy.routing.policies import POLICIES, make_router
from kvferry.proto import worker_pb2

BLOCK = 16
IDENTITY = worker_pb2.ModelIdentity(
    weights_digest=b"w" * 32, tokenizer_digest=b"t" * 32, spec_digest=b"s" * 32, numerics_class=b"n" * 32
)
DOCUMENT = [7 + i % 200 for i in range(10 * BLOCK)]


def stats(*, queued_s=0.0, jobs=0, **prefill):
    speeds = {"token_seconds": 0.01, "uses_store": True, "fetch_bytes_per_second": 1e4, "cache_blocks": 100}
    return worker_pb2.WorkerStats(
        prefill=worker_pb2.PrefillStats(queued_seconds=queued_s, num_computing=jobs, **(speeds | prefill)),
        decode=worker_pb2.DecodeStats(pool_blocks=1000, step_seconds=0.01),
    )


@pytest.fixture
async def workers(lab):
    async def make(role, count, script):
        return [
            await lab.worker(script, roles=(role,), identity=IDENTITY, block_size=BLOCK, stats=stats())
            for _ in range(count)
        ]

    return await make("prefill", 3, []), await make("decode", 2, [lab.end(0)])


async def serving(lab, workers, **config):
    prefills, decodes = workers
    gateway = await lab.gateway(decodes, prefills, **config)
    await lab.eventually(lambda: gateway._pool.candidates().num_pairs == 6)
    await lab.eventually(lambda: all(w.load.speeds for w in gateway._pool._workers.values()))
    return gateway, await lab.stub(gateway)


async def ask(lab, stub, *question):
    request = lab.request(max_tokens=4)
    request.token_ids.ids.extend([*DOCUMENT, *question])
    return [chunk async for chunk in stub.Generate(request)]


def prefills_used(decodes):
    return {request.prefill_address for worker in decodes for request in worker.requests}


class TestRouting:
    async def test_affinity(self, lab, workers):
        _, stub = await serving(lab, workers)
        for question in range(4):
            await ask(lab, stub, question)
        assert len(prefills_used(workers[1])) == 1
        assert sorted(len(worker.requests) for worker in workers[1]) == [0, 4]

    async def test_affinity_of_requests_that_run_together(self, lab, workers):
        for worker in workers[1]:
            worker.script = [0.5, lab.end(0)]
        _, stub = await serving(lab, workers)
        await asyncio.gather(*(ask(lab, stub, question) for question in range(4)))
        assert len(prefills_used(workers[1])) == 1

    async def test_spills_over_when_the_worker_says_that_it_is_busy(self, lab, workers):
        prefills, decodes = workers
        gateway, stub = await serving(lab, workers)
        await ask(lab, stub, 1)
        (first,) = prefills_used(decodes)
        (busy,) = (worker for worker in prefills if worker.address == first)
        busy.stats = stats(queued_s=500.0, jobs=500)
        known = gateway._pool._workers[first].load
        await lab.eventually(lambda: known.prefill.num_computing == 500)
        await ask(lab, stub, 2)
        assert len(prefills_used(decodes)) == 2

    async def test_round_robin(self, lab, workers):
        _, stub = await serving(lab, workers, router=make_router("round-robin"))
        for question in range(6):
            await ask(lab, stub, question)
        assert prefills_used(workers[1]) == {worker.address for worker in workers[0]}
        assert [len(worker.requests) for worker in workers[1]] == [3, 3]

    @pytest.mark.parametrize("policy", POLICIES)
    async def test_workers_that_say_nothing_of_their_load_serve(self, lab, workers, policy):
        prefills, decodes = workers
        for worker in (*prefills, *decodes):
            worker.stats = None
        gateway = await lab.gateway(decodes, prefills, router=make_router(policy))
        stub = await lab.stub(gateway)
        for question in range(4):
            assert (await ask(lab, stub, question))[-1].finish_reason == "stop"
