"""What the gateway refuses: prompts, fields, malformed messages, too many requests."""

import asyncio
import math
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2

from kvferry.deploy.admission import Admission
from kvferry.deploy.config import RequestLimits
from kvferry.deploy.gateway import SERVICE
from kvferry.proto import inference_pb2

Code = grpc.StatusCode
SERVING = health_pb2.HealthCheckResponse.SERVING
HANG = 60.0
ROLE = {"decode": ("decode",), "prefill": ("prefill",)}


class TestLimits:
    @pytest.mark.parametrize("extra", [0, 1, 10_000, 3 * 2**20])
    async def test_bytes(self, lab, extra):
        worker = await lab.worker([lab.end(0)])
        gateway = await lab.gateway([worker], limits=RequestLimits(max_prompt_bytes=1000))
        stub = await lab.stub(gateway)
        call = stub.Generate(lab.request("x" * (1000 + extra), max_tokens=1))
        if not extra:
            assert [chunk async for chunk in call]
            return
        code, details, _ = await lab.refused(call)
        if extra < 2**20:
            assert (code, details) == (
                Code.INVALID_ARGUMENT,
                f"The prompt has {1000 + extra:,} bytes; at most 1,000 are accepted.",
            )
        else:  # gRPC does not read it
            assert code == Code.RESOURCE_EXHAUSTED
        assert not worker.requests

    @pytest.mark.parametrize(
        ("num_tokens", "max_tokens", "sentence"),
        [
            pytest.param(511, 1, None, id="fits"),
            pytest.param(511, None, None, id="default-shrinks"),
            pytest.param(512, None, "The prompt has 512 tokens; the model holds 512 tokens", id="full"),
            pytest.param(500, 13, "500 tokens and max_tokens is 13, together 513; the model holds 512", id="over"),
        ],
    )
    async def test_tokens(self, lab, num_tokens, max_tokens, sentence):
        worker = await lab.worker([lab.end(0)])
        stub = await lab.stub(await lab.gateway([worker]))
        message = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5] * num_tokens))
        if max_tokens:
            message.sampling.max_tokens = max_tokens
        if sentence is None:
            assert [chunk async for chunk in stub.Generate(message)]
            assert worker.requests[0].sampling.max_tokens == 1
        else:
            code, details, _ = await lab.refused(stub.Generate(message))
            assert code == Code.INVALID_ARGUMENT
            assert sentence in details

    async def test_the_shortest_worker_limits(self, lab):
        decode = await lab.worker(lab.text_script("a"), roles=ROLE["decode"])
        prefill = await lab.worker(roles=ROLE["prefill"], max_model_len=100)
        stub = await lab.stub(await lab.gateway([decode], [prefill]))
        code, details, _ = await lab.refused(stub.Generate(lab.request(max_tokens=100)))
        assert code == Code.INVALID_ARGUMENT
        assert "the model holds 100 tokens" in details

    @pytest.mark.parametrize(
        ("field", "value", "allowed"),
        [
            ("temperature", -0.01, "0 to 2"),
            ("temperature", 2.01, "0 to 2"),
            ("temperature", math.nan, "0 to 2"),
            ("temperature", math.inf, "0 to 2"),
            ("top_p", 0, "above 0 to 1"),
            ("top_p", 1.01, "above 0 to 1"),
            ("top_k", -1, "0 to 49152"),
            ("top_k", 49153, "0 to 49152"),
            ("min_p", -0.1, "0 to 1"),
            ("min_p", 1.1, "0 to 1"),
            ("repetition_penalty", 0, "above 0 to 10"),
            ("repetition_penalty", 10.5, "above 0 to 10"),
            ("presence_penalty", -2.5, "-2 to 2"),
            ("frequency_penalty", 2.5, "-2 to 2"),
            ("max_tokens", 0, "1 to 4096"),
            ("max_tokens", 4097, "1 to 4096"),
            ("max_tokens", 2**32 - 1, "1 to 4096"),
            ("min_tokens", 4097, "0 to 4096"),
            ("top_logprobs", 21, "0 to 20"),
            ("stop", ["x"] * 17, "at most 16 strings"),
            ("stop", ["x" * 257], "1 to 256 characters"),
            ("stop", ["ok", ""], "1 to 256 characters"),
            ("stop_token_ids", [49152], "0 to 49151"),
            ("stop_token_ids", [1] * 65, "at most 64 ids"),
        ],
    )
    async def test_fields_outside_their_range(self, lab, field, value, allowed):
        worker = await lab.worker(lab.text_script("a"))
        stub = await lab.stub(await lab.gateway([worker]))
        code, details, _ = await lab.refused(stub.Generate(lab.request(**{field: value})))
        assert code == Code.INVALID_ARGUMENT
        assert details.startswith(f"sampling.{field}")
        assert details.endswith(f"allowed: {allowed}.")
        assert not worker.requests

    @pytest.mark.parametrize(
        "fields",
        [
            {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 0.01, "max_tokens": 1},
            {"temperature": 2, "top_p": 0.01, "top_k": 49152, "min_p": 1, "repetition_penalty": 10},
            {"presence_penalty": -2, "frequency_penalty": 2, "top_logprobs": 20, "seed": 2**64 - 1},
            {"stop": ["x" * 256] * 16, "stop_token_ids": [49151] * 64, "max_tokens": 500, "min_tokens": 500},
        ],
    )
    async def test_fields_at_their_bounds(self, lab, fields):
        stub = await lab.stub(await lab.gateway([await lab.worker([lab.end(0)])]))
        assert [chunk async for chunk in stub.Generate(lab.request(**fields))]

    async def test_min_tokens_above_max_tokens(self, lab):
        stub = await lab.stub(await lab.gateway([await lab.worker()]))
        _, details, _ = await lab.refused(stub.Generate(lab.request(max_tokens=5, min_tokens=6)))
        assert details == "sampling.min_tokens is 6; allowed: 0 to 5."

    async def test_unset_seeds_are_random_63_bit(self, lab):
        worker = await lab.worker([lab.end(0)])
        stub = await lab.stub(await lab.gateway([worker]))
        for _ in range(5):
            async for chunk in stub.Generate(lab.request()):
                assert chunk.usage.seed == worker.requests[-1].sampling.seed < 2**63
        assert len({sent.sampling.seed for sent in worker.requests}) == 5

    @pytest.mark.parametrize(
        "data", [b"\xff\xff\xff\xff", b"\x1a\x03\xed\xa0\x80", b"\x1a\xff", b"\x22" * 50], ids=repr
    )
    async def test_malformed_messages(self, lab, data):
        gateway = await lab.gateway([await lab.worker()])
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            code, details, _ = await lab.refused(channel.unary_stream(f"/{SERVICE}/Generate")(data))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{SERVICE}/CountTokens")(data)
        assert code == caught.value.code() == Code.INVALID_ARGUMENT
        assert "no valid message" in details

    @pytest.mark.parametrize("request_id", ["x" * 129, "a b", "é", "a\n"])
    async def test_request_ids(self, lab, request_id):
        stub = await lab.stub(await lab.gateway([await lab.worker()]))
        code, details, _ = await lab.refused(stub.Generate(lab.request(request_id=request_id)))
        assert code == Code.INVALID_ARGUMENT
        assert "request_id" in details

    async def test_a_request_id_runs_once_at_a_time(self, lab):
        worker = await lab.worker([5, HANG])
        stub = await lab.stub(await lab.gateway([worker]))
        running = stub.Generate(lab.request(request_id="same"))
        await lab.first(running)
        assert (await lab.refused(stub.Generate(lab.request(request_id="same"))))[0] == Code.ALREADY_EXISTS
        running.cancel()
        await lab.eventually(lambda: worker.num_running == 0)
        worker.script = [lab.end(0)]
        assert [chunk async for chunk in stub.Generate(lab.request(request_id="same"))]

    async def test_unknown_model(self, lab):
        stub = await lab.stub(await lab.gateway([await lab.worker()]))
        message = lab.request()
        message.model = "other"
        assert (await lab.refused(stub.Generate(message)))[0] == Code.NOT_FOUND


class TestOverload:
    async def test_more_than_the_queue_holds_is_sent_away(self, lab):
        worker = await lab.worker([5, 0.3, lab.end(1)])
        gateway = await lab.gateway([worker], limits=RequestLimits(max_concurrent=2, max_queued=3))
        stub = await lab.stub(gateway)

        async def one():
            try:
                chunks = [chunk async for chunk in stub.Generate(lab.request())]
                return chunks[-1].finish_reason, None
            except grpc.aio.AioRpcError as error:
                return error.code(), dict(error.trailing_metadata())

        results = await asyncio.gather(*(one() for _ in range(12)))
        reasons = [reason for reason, _ in results]
        assert reasons.count("stop") == 5
        assert reasons.count(Code.RESOURCE_EXHAUSTED) == 7
        for reason, trailing in results:
            if reason == Code.RESOURCE_EXHAUSTED:
                assert 100 <= int(trailing["retry-after-ms"]) <= 30_000
                assert trailing["kvferry-error"] == "Overloaded"
        assert [reason for reason, _ in [await one()]] == ["stop"]

    async def test_cancelled_waiters_leave_the_queue(self, lab):
        worker = await lab.worker([5, HANG])
        gateway = await lab.gateway([worker], limits=RequestLimits(max_concurrent=1, max_queued=2))
        stub = await lab.stub(gateway)
        running = stub.Generate(lab.request())
        await lab.first(running)
        admission = gateway._gateway._answering
        for _ in range(3):
            waiting = [stub.Generate(lab.request()) for _ in range(2)]
            await lab.eventually(lambda: admission.num_queued == 2)
            for call in waiting:
                call.cancel()
            await lab.eventually(lambda: admission.num_queued == 0)
        running.cancel()
        await lab.eventually(lambda: admission.num_running == 0)

    async def test_a_slot_given_to_a_waiter_that_leaves_is_not_lost(self):
        admission = Admission(max_concurrent=1, max_queued=1)

        async def wait():
            async with admission.slot():
                raise AssertionError("cancelled before")

        async with admission.slot():
            waiter = asyncio.create_task(wait())
            await asyncio.sleep(0)
            assert admission.num_queued == 1
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        assert waiter.cancelled()
        assert (admission.num_running, admission.num_queued) == (0, 0)

    async def test_a_full_worker_says_when_to_come_back(self, lab):
        worker = await lab.worker([Code.RESOURCE_EXHAUSTED], details="all blocks are in use")
        stub = await lab.stub(await lab.gateway([worker]))
        code, details, trailing = await lab.refused(stub.Generate(lab.request()))
        assert code == Code.RESOURCE_EXHAUSTED
        assert "all blocks are in use" in details
        assert int(trailing["retry-after-ms"]) > 0

    async def test_health_answers_under_load(self, lab):
        worker = await lab.worker([0.2, lab.end(0)])
        gateway = await lab.gateway([worker], limits=RequestLimits(max_concurrent=2, max_queued=2))
        stub = await lab.stub(gateway)
        calls = [stub.Generate(lab.request()) for _ in range(50)]
        started = time.monotonic()
        assert await lab.health(gateway) == SERVING
        assert time.monotonic() - started < 10
        codes = await asyncio.gather(*(lab.drain(call) for call in calls))
        assert codes.count(Code.OK) == 4
