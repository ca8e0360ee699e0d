"""Clients that lose their gateway in the middle of an answer: at another one it goes on with the next token."""

import asyncio

import grpc
import pytest
from support.relay import Relay

from kvferry.deploy.client import AsyncClient, Client, RetryPolicy, ServerError, Unavailable
from kvferry.deploy.received import TokenDigest
from kvferry.proto import inference_pb2

Code = grpc.StatusCode
HANG = 60.0
SILENT_S = 4.0
IDS = [1001, 1002, 1003, 1004, 1005, 1006]


def script(lab, ids=IDS, at=None):
    """Tokens `ids`; before token `at` the worker hangs."""
    steps = []
    for index, token in enumerate(ids):
        if index == at:
            steps.append(HANG)
        steps.append(token)
    if at == len(ids):
        steps.append(HANG)
    return [*steps, lab.end(len(ids))]


def received(ids):
    digest = TokenDigest()
    digest.update(ids)
    told = digest.received
    return inference_pb2.Received(num_tokens=told.num_tokens, digest=told.digest)


async def two_gateways(lab, at, second_ids=IDS):
    """The first one's worker hangs before token `at`, and it is reached through a relay."""
    first = await lab.gateway([await lab.worker(script(lab, at=at))])
    second = await lab.gateway([await lab.worker(script(lab, second_ids))])
    relay = Relay()
    await relay.start(first.address)
    lab._stack.push_async_callback(relay.stop)
    return second, relay


@pytest.mark.parametrize("at", range(1, len(IDS) + 1))
async def test_an_answer_goes_on_at_another_gateway(lab, at):
    second, relay = await two_gateways(lab, at)
    async with AsyncClient([relay.address, second.address]) as client:
        client._gateways.current = 0
        chunks = []
        async for chunk in client.stream("Hi", temperature=0.9):
            chunks.append(chunk)
            if len(chunks) == at:
                relay.cut()
    assert [chunk.index for chunk in chunks] == list(range(len(IDS) + 1))
    assert [token for chunk in chunks for token in chunk.token_ids] == [*IDS, lab.EOS]
    assert "".join(chunk.text for chunk in chunks) == lab.tokenizer.decode(IDS)
    assert chunks[-1].usage.completion_tokens == len(IDS) + 1
    assert second._gateway.counters.num_resumed == 1  # the control: it did go on there


async def test_the_same_id_seed_and_a_greater_attempt_go_to_the_workers(lab):
    workers = [await lab.worker(script(lab, at=2)), await lab.worker(script(lab))]
    first, second = [await lab.gateway([worker]) for worker in workers]
    relay = Relay()
    await relay.start(first.address)
    lab._stack.push_async_callback(relay.stop)
    async with AsyncClient([relay.address, second.address]) as client:
        client._gateways.current = 0
        async for chunk in client.stream("Hi", temperature=0.9):
            if chunk.index == 1:
                relay.cut()
    [[before], [after]] = [worker.requests for worker in workers]
    assert before.request_id == after.request_id
    assert before.sampling == after.sampling
    assert before.sampling.seed
    assert before.attempt < after.attempt


async def test_the_sync_client_goes_on_too(lab):
    second, relay = await two_gateways(lab, 3)
    loop = asyncio.get_running_loop()
    tokens = []

    def run():
        with Client(f"{relay.address}, {second.address}") as client:
            client._gateways.current = 0
            for chunk in client.stream("Hi"):
                tokens.extend(chunk.token_ids)
                if len(tokens) == 3:
                    loop.call_soon_threadsafe(relay.cut)

    await asyncio.to_thread(run)
    assert tokens == [*IDS, lab.EOS]
    assert second._gateway.counters.num_resumed == 1


async def test_another_answer_is_never_passed_off_as_the_rest(lab):
    second, relay = await two_gateways(lab, 3, second_ids=[1001, 1002, 999, 1004, 1005, 1006])
    async with AsyncClient([relay.address, second.address]) as client:
        client._gateways.current = 0
        chunks = []
        with pytest.raises(ServerError, match="DATA_LOSS"):
            async for chunk in client.stream("Hi"):
                chunks.append(chunk)
                if len(chunks) == 3:
                    relay.cut()
    assert [token for chunk in chunks for token in chunk.token_ids] == IDS[:3]


async def test_the_same_gateway_after_a_restart(lab):
    worker = await lab.worker(script(lab, at=2))
    gateway = await lab.gateway([worker])
    relay, again = Relay(), Relay()
    await relay.start(gateway.address)
    async with AsyncClient(relay.address) as client:
        chunks = []
        async for chunk in client.stream("Hi"):
            chunks.append(chunk)
            if len(chunks) == 2:
                relay.cut()
                worker.script = script(lab)
                await again.start(gateway.address, port=int(relay.address.rpartition(":")[2]))
                lab._stack.push_async_callback(again.stop)
    assert [token for chunk in chunks for token in chunk.token_ids] == [*IDS, lab.EOS]
    await lab.eventually(lambda: gateway._gateway._running.num_running == 0)
    assert gateway._gateway.counters.num_resumed == 1


async def reconnect(lab, gateway, worker, relay):
    """Cuts a connection whose request has no token yet, and lets the address be reached again."""
    await lab.eventually(lambda: worker.num_running == 1)
    relay.cut()
    worker.script = script(lab)
    again = Relay()
    await again.start(gateway.address, port=int(relay.address.rpartition(":")[2]))
    lab._stack.push_async_callback(again.stop)


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
async def test_a_request_without_a_token_goes_on_at_the_only_gateway(lab, sync):
    """A connection that is taken for lost costs another try, no error: however long the request was silent before."""
    worker = await lab.worker(script(lab, at=0))
    gateway = await lab.gateway([worker])
    relay = Relay()
    await relay.start(gateway.address)
    retry = RetryPolicy(patience_s=0.75 * SILENT_S)

    def ask():
        with Client(relay.address, retry=retry) as client:
            return client.generate("Hi", timeout=HANG)

    async def ask_async():
        async with AsyncClient(relay.address, retry=retry) as client:
            return await client.generate("Hi", timeout=HANG)

    asking = asyncio.create_task(asyncio.to_thread(ask) if sync else ask_async())
    await asyncio.sleep(SILENT_S)
    await reconnect(lab, gateway, worker, relay)
    assert (await asking).token_ids == (*IDS, lab.EOS)
    assert len(worker.requests) == 2


async def test_an_attempt_ends_the_one_before_it(lab):
    """A client that lost its connection may be back before the gateway has noticed."""
    worker = await lab.worker(script(lab, at=2))
    gateway = await lab.gateway([worker])
    stub = await lab.stub(gateway)
    request = inference_pb2.GenerateRequest(text="Hi", request_id="one", attempt=1000)
    request.sampling.seed = 7
    older = stub.Generate(request)
    assert (await older.read()).seed == 7
    await older.read()
    worker.script = script(lab)
    request.attempt = 2000
    request.received.append(received(IDS[:2]))
    newer = [chunk async for chunk in stub.Generate(request)]
    assert [chunk.index for chunk in newer] == list(range(2, len(IDS) + 1))
    assert await older.code() == Code.ABORTED
    request.attempt = 1500
    code, details, _ = await lab.refused(stub.Generate(request))
    assert (code, "newer attempt" in details) == (Code.ABORTED, True)
    stats = gateway._gateway.stats()
    assert (stats.num_superseded, stats.num_resumed) == (1, 2)
    await lab.eventually(lambda: worker.num_running == 0)


@pytest.mark.parametrize(
    ("num_tokens", "finishes"), [(len(IDS) + 1, True), (len(IDS) + 2, False)], ids=["all", "more-than-all"]
)
async def test_a_client_that_has_all_tokens_gets_the_usage(lab, num_tokens, finishes):
    gateway = await lab.gateway([await lab.worker(script(lab))])
    stub = await lab.stub(gateway)
    request = inference_pb2.GenerateRequest(text="Hi", request_id="one", attempt=1000)
    request.sampling.seed = 7
    request.received.append(received([*IDS, lab.EOS, 9][:num_tokens]))
    if not finishes:
        code, details, _ = await lab.refused(stub.Generate(request))
        assert (code, "computed again" in details) == (Code.DATA_LOSS, True)
        return
    [chunk] = [chunk async for chunk in stub.Generate(request)]
    assert (chunk.index, list(chunk.token_ids), chunk.finish_reason) == (len(IDS) + 1, [], "stop")
    assert chunk.usage.completion_tokens == len(IDS) + 1


@pytest.mark.parametrize("missing", ["request_id", "attempt", "seed", "n"])
async def test_what_a_resumed_request_needs(lab, missing):
    gateway = await lab.gateway([await lab.worker(script(lab))])
    request = inference_pb2.GenerateRequest(text="Hi", request_id="one", attempt=1000)
    request.sampling.seed = 7
    request.received.append(received(IDS[:2]))
    if missing == "seed":
        request.sampling.ClearField("seed")
    elif missing == "n":
        request.received.append(received(IDS[:2]))
    else:
        request.ClearField(missing)
    code, details, _ = await lab.refused((await lab.stub(gateway)).Generate(request))
    assert (code, "received" in details) == (Code.INVALID_ARGUMENT, True)


async def test_a_draining_gateway_sends_new_requests_elsewhere(lab):
    """And ends what is running when its time is over; the client goes on with that elsewhere, too."""
    first = await lab.gateway([await lab.worker(script(lab, at=2))])
    second = await lab.gateway([await lab.worker(script(lab))])
    async with AsyncClient([first.address, second.address]) as client:
        client._gateways.current = 0
        running = client.stream("Hi")
        chunks = [await anext(running) for _ in range(2)]
        draining = asyncio.create_task(first.drain(1.0))
        await lab.eventually(lambda: first._gateway._running.draining)
        client._gateways.current = 0
        assert (await client.generate("Hi")).token_ids == (*IDS, lab.EOS)
        assert not await draining
        chunks += [chunk async for chunk in running]
    assert [token for chunk in chunks for token in chunk.token_ids] == [*IDS, lab.EOS]
    stats = first._gateway.stats()
    assert (stats.num_refused, stats.num_cut, stats.num_running) == (1, 1, 0)
    assert second._gateway.counters.num_resumed == 1


async def test_tries_are_bounded(lab):
    _, relay = await two_gateways(lab, 3)
    async with AsyncClient([relay.address, "127.0.0.1:9"], retry=RetryPolicy(max_attempts=5)) as client:
        client._gateways.current = 0
        tokens = []
        with pytest.raises(Unavailable, match="No gateway answers"):
            async for chunk in client.stream("Hi"):
                tokens.extend(chunk.token_ids)
                if len(tokens) == 3:
                    relay.cut()
    assert tokens == IDS[:3]


async def test_the_deadline_bounds_the_tries():
    async with AsyncClient(["127.0.0.1:9", "127.0.0.1:10"], retry=RetryPolicy(patience_s=HANG)) as client:
        async with asyncio.timeout(20):
            with pytest.raises(Unavailable):
                await client.generate("Hi", timeout=1.0)


async def test_questions_are_asked_elsewhere_too(lab):
    gateway = await lab.gateway([await lab.worker(script(lab))])
    async with AsyncClient(["127.0.0.1:9", gateway.address]) as client:
        client._gateways.current = 0
        assert [model.id for model in await client.models()] == ["demo"]
        assert client._gateways.current == 1
        assert (await client.count_tokens("Hi")).tokens == 1


def test_addresses():
    with pytest.raises(ValueError, match="address"):
        Client(" , ")
    with Client("a:1,b:2,a:1") as client:
        assert client._gateways.addresses == ("a:1", "b:2")
