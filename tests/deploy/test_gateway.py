"""The gateway over real sockets, in front of stand-in workers."""

import asyncio
import logging
import math
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvferry.deploy.client import AsyncClient
from kvferry.deploy.config import GatewayConfig, RequestLimits
from kvferry.deploy.gateway import SERVICE
from kvferry.proto import inference_pb2, inference_pb2_grpc, worker_pb2

Code = grpc.StatusCode
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
HANG = 60.0
ROLE = {"decode": ("decode",), "prefill": ("prefill",)}


def request(text="Hi", *, request_id="", **sampling):
    return inference_pb2.GenerateRequest(text=text, request_id=request_id, sampling=inference_pb2.Sampling(**sampling))


async def refused(call):
    """The status of a call that must fail, and its trailing metadata."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value.code(), caught.value.details(), dict(caught.value.trailing_metadata())


async def first(call):
    return await anext(aiter(call))


async def drain(call):
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError:
        pass
    return await call.code()


async def eventually(condition, seconds=3.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        await asyncio.sleep(0.01)


async def health(gateway, service=""):
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return reply.status


class TestAnswer:
    async def test_tokens_text_and_usage(self, lab):
        prefill = await lab.worker(roles=ROLE["prefill"])
        usage = worker_pb2.DecodeUsage(
            prefill=worker_pb2.PrefillUsage(
                num_cached_tokens=64,
                store_bytes_read=1000,
                store_bytes_written=200,
                store_tokens_read=64,
                store_tokens_written=32,
                fetch_seconds=0.25,
                compute_seconds=0.5,
            ),
            store_bytes_read=30,
            store_tokens_read=96,
            handoff_bytes=4,
            handoff_tokens=5,
            transfer_seconds=0.125,
        )
        text = "Hi 🤖 汉字!"
        decode = await lab.worker(lab.text_script(text, usage=usage), roles=ROLE["decode"])
        stub = await lab.stub(await lab.gateway([decode], [prefill]))
        chunks = [chunk async for chunk in stub.Generate(request("Hello there", seed=5))]

        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        assert [list(chunk.token_ids) for chunk in chunks] == [[t] for t in [*lab.ids(text), lab.EOS]]
        assert "".join(chunk.text for chunk in chunks) == text
        assert not any("\ufffd" in chunk.text for chunk in chunks)
        assert [chunk.finish_reason for chunk in chunks] == [""] * (len(chunks) - 1) + ["stop"]
        assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        told = chunks[-1].usage
        assert told.prompt_tokens == 2
        assert told.completion_tokens == len(chunks)
        assert told.cached_tokens == 64
        assert told.kv_bytes_moved == 1234
        assert told.kv_bytes_bf16 == (64 + 32 + 96 + 5) * 100
        assert (told.prefill_compute_seconds, told.store_fetch_seconds, told.transfer_seconds) == (0.5, 0.25, 0.125)
        assert told.seed == 5
        sent = decode.requests[0]
        assert sent.prefill_address == prefill.address
        assert sent.tenant == "default"
        assert list(sent.token_ids) == lab.ids("Hello there")
        await eventually(lambda: decode.num_running == 0)
        assert decode.num_cancelled == 0

    async def test_one_worker_prefills_by_itself(self, lab):
        worker = await lab.worker(lab.text_script("a"))
        for prefill in ([], [worker]):
            stub = await lab.stub(await lab.gateway([worker], prefill))
            assert [chunk async for chunk in stub.Generate(request())]
        assert [sent.prefill_address for sent in worker.requests] == ["", ""]

    async def test_length_flushes_an_incomplete_character(self, lab):
        incomplete = lab.ids("🤖")[0]
        stub = await lab.stub(await lab.gateway([await lab.worker([lab.end(0, incomplete, "length")])]))
        (chunk,) = [chunk async for chunk in stub.Generate(request(max_tokens=1))]
        assert (chunk.text, chunk.finish_reason) == ("\ufffd", "length")

    async def test_ttft_is_when_the_first_token_came(self, lab):
        stub = await lab.stub(await lab.gateway([await lab.worker([0.2, 5, 0.2, lab.end(1)])]))
        chunks = [chunk async for chunk in stub.Generate(request())]
        assert 0.2 <= chunks[-1].usage.ttft_seconds < 0.35
        assert 0.4 <= chunks[-1].usage.e2e_seconds < 0.8

    async def test_tokens_are_not_held_back(self, lab):
        stub = await lab.stub(await lab.gateway([await lab.worker([5, HANG])]))
        call = stub.Generate(request())
        async with asyncio.timeout(2):
            assert (await first(call)).index == 0
        call.cancel()


class TestStop:
    async def test_stop_string_across_tokens_ends_the_decode_call(self, lab):
        worker = await lab.worker([*lab.ids("One two three four five"), *[5] * 5, HANG])
        stub = await lab.stub(await lab.gateway([worker]))
        chunks = [chunk async for chunk in stub.Generate(request(stop=["o three f", "zzz"], seed=1))]
        assert "".join(chunk.text for chunk in chunks) == "One tw"
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        assert chunks[-1].finish_reason == "stop"
        assert chunks[-1].usage.completion_tokens == len(chunks) == len(lab.ids("One two three four"))
        await eventually(lambda: worker.num_cancelled == 1, 1)

    async def test_usage_sent_early_survives_a_stop_string(self, lab):
        start, *rest = lab.ids("Stop here please")
        usage = worker_pb2.DecodeUsage(handoff_bytes=77)
        worker = await lab.worker([worker_pb2.TokenChunk(token_id=start, usage=usage), *rest, HANG])
        stub = await lab.stub(await lab.gateway([worker]))
        chunks = [chunk async for chunk in stub.Generate(request(stop=[" here"]))]
        assert chunks[-1].usage.kv_bytes_moved == 77

    async def test_held_text_comes_when_the_answer_ends(self, lab):
        stub = await lab.stub(await lab.gateway([await lab.worker(lab.text_script("Well </e"))]))
        chunks = [chunk async for chunk in stub.Generate(request(stop=["</end>"]))]
        assert "".join(chunk.text for chunk in chunks) == "Well </e"

    async def test_min_tokens_come_before_stop_strings(self, lab):
        script = lab.text_script("a b a b a b a b")
        stub = await lab.stub(await lab.gateway([await lab.worker(script)]))
        chunks = [chunk async for chunk in stub.Generate(request(stop=[" b"], min_tokens=5))]
        assert "".join(chunk.text for chunk in chunks) == "a b a b a"
        assert len(chunks) == 6

    @pytest.mark.parametrize("ignore_eos", [False, True])
    async def test_end_tokens(self, lab, ignore_eos):
        worker = await lab.worker(lab.text_script("a"))
        stub = await lab.stub(await lab.gateway([worker]))
        async for _ in stub.Generate(request(stop_token_ids=[9, 9], ignore_eos=ignore_eos)):
            pass
        assert list(worker.requests[0].sampling.stop_token_ids) == [9] if ignore_eos else [lab.EOS, 9]


class TestOrder:
    @pytest.mark.parametrize(
        ("script", "sentence"),
        [
            pytest.param([5, worker_pb2.TokenChunk(index=2, token_id=5)], "token 2 where token 1 was due", id="gap"),
            pytest.param([5, worker_pb2.TokenChunk(index=0, token_id=5)], "token 0 where token 1", id="repeat"),
            pytest.param([worker_pb2.TokenChunk(index=1, token_id=5)], "token 1 where token 0 was due", id="start"),
            pytest.param([5, 6], "broke off after 2 tokens", id="no-end"),
            pytest.param([5, 5, 5, 5, 5], "more than max_tokens = 4", id="too-many"),
            pytest.param([99_999], "outside the vocabulary as token 0", id="id"),
            pytest.param([worker_pb2.TokenChunk(finish_reason="bored")], "unknown finish reason", id="reason"),
        ],
    )
    async def test_impossible_tokens_end_the_stream(self, lab, script, sentence):
        worker = await lab.worker(script)
        stub = await lab.stub(await lab.gateway([worker]))
        code, details, _ = await refused(stub.Generate(request(max_tokens=4)))
        assert code == Code.DATA_LOSS
        assert sentence in details
        await eventually(lambda: worker.num_running == 0)
        assert len(worker.requests) == 1


class TestCancel:
    @pytest.mark.parametrize("num_tokens", [0, 1, 5])
    async def test_client_cancel_reaches_the_worker(self, lab, num_tokens):
        worker = await lab.worker([*[5] * num_tokens, HANG])
        stub = await lab.stub(await lab.gateway([worker]))
        call = stub.Generate(request())
        for _ in range(num_tokens):
            await first(call)
        await eventually(lambda: worker.num_running == 1)
        call.cancel()
        await eventually(lambda: worker.num_cancelled == 1, 1)

    async def test_client_deadline_reaches_the_worker(self, lab):
        worker = await lab.worker([5, HANG])
        stub = await lab.stub(await lab.gateway([worker]))
        started = time.monotonic()
        code, _, _ = await refused(stub.Generate(request(), timeout=0.3))
        assert code == Code.DEADLINE_EXCEEDED
        assert time.monotonic() - started < 1.3
        await eventually(lambda: worker.num_cancelled == 1, 1)

    async def test_default_deadline(self, lab):
        worker = await lab.worker([5, HANG])
        gateway = await lab.gateway([worker], limits=RequestLimits(default_timeout_s=0.3))
        code, details, _ = await refused((await lab.stub(gateway)).Generate(request()))
        assert (code, bool(details)) == (Code.DEADLINE_EXCEEDED, True)
        await eventually(lambda: worker.num_cancelled == 1, 1)

    async def test_deadline_passes_while_queued(self, lab):
        worker = await lab.worker([5, HANG])
        gateway = await lab.gateway([worker], limits=RequestLimits(max_concurrent=1, default_timeout_s=0.3))
        stub = await lab.stub(gateway)
        running = stub.Generate(request(), timeout=30)
        await first(running)
        assert (await refused(stub.Generate(request())))[0] == Code.DEADLINE_EXCEEDED
        assert len(worker.requests) == 1
        running.cancel()

    async def test_slow_client_is_dropped(self, lab):
        long = lab.tokenizer.convert_tokens_to_ids("Ġ" * 16)
        top = [worker_pb2.TokenLogprob(token_id=long)] * 20
        script = [worker_pb2.TokenChunk(index=i, token_id=long, top_logprobs=top) for i in range(500)]
        worker = await lab.worker([*script, lab.end(500)])
        gateway = await lab.gateway([worker], limits=RequestLimits(write_timeout_s=0.3))
        options = [("grpc.http2.bdp_probe", 0)]  # else 2 MB fit into the connection
        async with grpc.aio.insecure_channel(gateway.address, options=options) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).Generate(request(max_tokens=501, top_logprobs=20))
            await first(call)
            await eventually(lambda: gateway._gateway._answering.num_running == 0)
            num_read = 1
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    num_read += 1
        assert caught.value.code() == Code.RESOURCE_EXHAUSTED
        assert "read nothing for 0.3 s" in caught.value.details()
        assert num_read < 400


class TestLimits:
    @pytest.mark.parametrize("extra", [0, 1, 10_000, 3 * 2**20])
    async def test_bytes(self, lab, extra):
        worker = await lab.worker([lab.end(0)])
        gateway = await lab.gateway([worker], limits=RequestLimits(max_prompt_bytes=1000))
        stub = await lab.stub(gateway)
        call = stub.Generate(request("x" * (1000 + extra), max_tokens=1))
        if not extra:
            assert [chunk async for chunk in call]
            return
        code, details, _ = await refused(call)
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
            code, details, _ = await refused(stub.Generate(message))
            assert code == Code.INVALID_ARGUMENT
            assert sentence in details

    async def test_the_shortest_worker_limits(self, lab):
        decode = await lab.worker(lab.text_script("a"), roles=ROLE["decode"])
        prefill = await lab.worker(roles=ROLE["prefill"], max_model_len=100)
        stub = await lab.stub(await lab.gateway([decode], [prefill]))
        code, details, _ = await refused(stub.Generate(request(max_tokens=100)))
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
        code, details, _ = await refused(stub.Generate(request(**{field: value})))
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
        assert [chunk async for chunk in stub.Generate(request(**fields))]

    async def test_min_tokens_above_max_tokens(self, lab):
        stub = await lab.stub(await lab.gateway([await lab.worker()]))
        _, details, _ = await refused(stub.Generate(request(max_tokens=5, min_tokens=6)))
        assert details == "sampling.min_tokens is 6; allowed: 0 to 5."

    async def test_unset_seeds_are_random_63_bit(self, lab):
        worker = await lab.worker([lab.end(0)])
        stub = await lab.stub(await lab.gateway([worker]))
        for _ in range(5):
            async for chunk in stub.Generate(request()):
                assert chunk.usage.seed == worker.requests[-1].sampling.seed < 2**63
        assert len({sent.sampling.seed for sent in worker.requests}) == 5

    @pytest.mark.parametrize(
        "data", [b"\xff\xff\xff\xff", b"\x1a\x03\xed\xa0\x80", b"\x1a\xff", b"\x22" * 50], ids=repr
    )
    async def test_malformed_messages(self, lab, data):
        gateway = await lab.gateway([await lab.worker()])
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            code, details, _ = await refused(channel.unary_stream(f"/{SERVICE}/Generate")(data))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{SERVICE}/CountTokens")(data)
        assert code == caught.value.code() == Code.INVALID_ARGUMENT
        assert "no valid message" in details

    @pytest.mark.parametrize("request_id", ["x" * 129, "a b", "é", "a\n"])
    async def test_request_ids(self, lab, request_id):
        stub = await lab.stub(await lab.gateway([await lab.worker()]))
        code, details, _ = await refused(stub.Generate(request(request_id=request_id)))
        assert code == Code.INVALID_ARGUMENT
        assert "request_id" in details

    async def test_a_request_id_runs_once_at_a_time(self, lab):
        worker = await lab.worker([5, HANG])
        stub = await lab.stub(await lab.gateway([worker]))
        running = stub.Generate(request(request_id="same"))
        await first(running)
        assert (await refused(stub.Generate(request(request_id="same"))))[0] == Code.ALREADY_EXISTS
        running.cancel()
        await eventually(lambda: worker.num_running == 0)
        worker.script = [lab.end(0)]
        assert [chunk async for chunk in stub.Generate(request(request_id="same"))]

    async def test_unknown_model(self, lab):
        stub = await lab.stub(await lab.gateway([await lab.worker()]))
        message = request()
        message.model = "other"
        assert (await refused(stub.Generate(message)))[0] == Code.NOT_FOUND


class TestOverload:
    async def test_more_than_the_queue_holds_is_sent_away(self, lab):
        worker = await lab.worker([5, 0.3, lab.end(1)])
        gateway = await lab.gateway([worker], limits=RequestLimits(max_concurrent=2, max_queued=3))
        stub = await lab.stub(gateway)

        async def one():
            try:
                chunks = [chunk async for chunk in stub.Generate(request())]
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
        running = stub.Generate(request())
        await first(running)
        admission = gateway._gateway._answering
        for _ in range(3):
            waiting = [stub.Generate(request()) for _ in range(2)]
            await eventually(lambda: admission.num_queued == 2)
            for call in waiting:
                call.cancel()
            await eventually(lambda: admission.num_queued == 0)
        running.cancel()
        await eventually(lambda: admission.num_running == 0)

    async def test_a_full_worker_says_when_to_come_back(self, lab):
        worker = await lab.worker([Code.RESOURCE_EXHAUSTED], details="all blocks are in use")
        stub = await lab.stub(await lab.gateway([worker]))
        code, details, trailing = await refused(stub.Generate(request()))
        assert code == Code.RESOURCE_EXHAUSTED
        assert "all blocks are in use" in details
        assert int(trailing["retry-after-ms"]) > 0

    async def test_health_answers_under_load(self, lab):
        worker = await lab.worker([0.2, lab.end(0)])
        gateway = await lab.gateway([worker], limits=RequestLimits(max_concurrent=2, max_queued=2))
        stub = await lab.stub(gateway)
        calls = [stub.Generate(request()) for _ in range(50)]
        started = time.monotonic()
        assert await health(gateway) == SERVING
        assert time.monotonic() - started < 0.5
        codes = await asyncio.gather(*(drain(call) for call in calls))
        assert codes.count(Code.OK) == 4


class TestWorkers:
    async def test_health_follows_the_workers(self, lab):
        prefill = await lab.worker(roles=ROLE["prefill"])
        decode = await lab.worker(lab.text_script("a"), roles=ROLE["decode"])
        await decode.stop()
        gateway = await lab.gateway([decode], [prefill], serving=False)
        assert await health(gateway) == await health(gateway, SERVICE) == NOT_SERVING
        code, details, _ = await refused((await lab.stub(gateway)).Generate(request()))
        assert code == Code.UNAVAILABLE
        assert f"No decode worker is ready: {decode.address} does not answer" in details

        await decode.start()
        await gateway.wait_until_serving(5)
        assert await health(gateway) == await health(gateway, SERVICE) == SERVING
        await prefill.stop()
        await eventually(lambda: "No prefill worker is ready" in gateway.problem)
        assert await health(gateway) == NOT_SERVING
        with pytest.raises(TimeoutError, match="No prefill worker is ready"):
            await gateway.wait_until_serving(0.1)

    async def test_worker_restart(self, lab):
        worker = await lab.worker(lab.text_script("a"))
        gateway = await lab.gateway([worker])
        stub = await lab.stub(gateway)
        for _ in range(3):
            assert [chunk async for chunk in stub.Generate(request())]
            await worker.stop()
            await eventually(lambda: gateway.problem)
            await worker.start()
            await gateway.wait_until_serving(5)
        assert [chunk async for chunk in stub.Generate(request())]

    async def test_identity_mismatch(self, lab):
        prefill = await lab.worker(roles=ROLE["prefill"], identity=lab.identity(b"old"))
        decode = await lab.worker(lab.text_script("a"), roles=ROLE["decode"], identity=lab.identity(b"new"))
        gateway = await lab.gateway([decode], [prefill], serving=False)
        await eventually(lambda: "cannot exchange blocks" in gateway.problem)
        assert await health(gateway) == NOT_SERVING
        code, details, _ = await refused((await lab.stub(gateway)).Generate(request()))
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
        await eventually(lambda: len(gateway._pool.pairs()) == 2)
        stub = await lab.stub(gateway)
        for _ in range(4):
            assert [chunk async for chunk in stub.Generate(request())]
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
        await eventually(lambda: sentence in gateway.problem)

    async def test_silent_worker_is_given_up(self, lab):
        worker = await lab.worker(lab.text_script("a"))
        gateway = await lab.gateway([worker])

        async def silent(request, context):
            await asyncio.sleep(HANG)

        describe, worker.Describe = worker.Describe, silent
        await worker.stop()
        await worker.start()
        await eventually(lambda: gateway.problem, 4)
        worker.Describe = describe

    async def test_load_spreads(self, lab):
        decodes = [await lab.worker([5, HANG], roles=ROLE["decode"]) for _ in range(3)]
        prefills = [await lab.worker(roles=ROLE["prefill"]) for _ in range(2)]
        gateway = await lab.gateway(decodes, prefills)
        await eventually(lambda: len(gateway._pool.pairs()) == 6)
        stub = await lab.stub(gateway)
        calls = [stub.Generate(request()) for _ in range(6)]
        for call in calls:
            await first(call)
        assert [worker.num_running for worker in decodes] == [2, 2, 2]
        addresses = [sent.prefill_address for worker in decodes for sent in worker.requests]
        assert sorted(addresses.count(worker.address) for worker in prefills) == [3, 3]
        for call in calls:
            call.cancel()

    async def test_another_router(self, lab):
        class Last:
            def pick(self, pairs, token_ids):
                assert token_ids
                return max(pairs, key=lambda pair: pair.decode.address)

        decodes = [await lab.worker([lab.end(0)]) for _ in range(2)]
        gateway = await lab.gateway(decodes, router=Last())
        await eventually(lambda: len(gateway._pool.pairs()) == 2)
        stub = await lab.stub(gateway)
        for _ in range(4):
            assert [chunk async for chunk in stub.Generate(request())]
        assert len(max(decodes, key=lambda worker: worker.address).requests) == 4

    async def test_workers_can_be_replaced(self, lab):
        old, new = await lab.worker([5, 0.3, lab.end(1)]), await lab.worker([lab.end(0)])
        gateway = await lab.gateway([old])
        stub = await lab.stub(gateway)
        running = stub.Generate(request())
        await first(running)
        gateway.set_workers(decode=[new.address])
        await gateway.wait_until_serving(5)
        assert [chunk async for chunk in stub.Generate(request())]
        assert len(new.requests) == 1
        assert [chunk.finish_reason async for chunk in running] == ["stop"]


class TestWorkerFailure:
    @pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.CANCELLED])
    async def test_lost_before_the_first_token_goes_elsewhere(self, lab, code):
        bad = await lab.worker([code])
        good = await lab.worker(lab.text_script("a"))
        gateway = await lab.gateway([bad, good])
        await eventually(lambda: len(gateway._pool.pairs()) == 2)
        stub = await lab.stub(gateway)
        for _ in range(4):
            chunks = [chunk async for chunk in stub.Generate(request())]
            assert [chunk.index for chunk in chunks] == [0, 1]
        assert bad.requests and len(good.requests) == 4
        assert bad.requests[0].sampling.seed in {sent.sampling.seed for sent in good.requests}

    async def test_a_dead_worker_goes_elsewhere_before_the_poll_sees_it(self, lab):
        one, other = [await lab.worker(lab.text_script("a")) for _ in range(2)]
        gateway = await lab.gateway([one, other])
        await eventually(lambda: len(gateway._pool.pairs()) == 2)
        await one.stop()
        stub = await lab.stub(gateway)
        for _ in range(3):
            assert [chunk async for chunk in stub.Generate(request())]

    async def test_a_lost_prefill_worker_is_avoided_too(self, lab):
        decode = await lab.worker([Code.UNAVAILABLE], roles=ROLE["decode"])
        prefills = [await lab.worker(roles=ROLE["prefill"]) for _ in range(2)]
        gateway = await lab.gateway([decode], prefills)
        await eventually(lambda: len(gateway._pool.pairs()) == 2)
        code, _, _ = await refused((await lab.stub(gateway)).Generate(request()))
        assert code == Code.UNAVAILABLE
        assert {sent.prefill_address for sent in decode.requests} == {worker.address for worker in prefills}

    async def test_only_one_other_is_tried(self, lab):
        workers = [await lab.worker([Code.UNAVAILABLE]) for _ in range(4)]
        gateway = await lab.gateway(workers)
        await eventually(lambda: len(gateway._pool.pairs()) == 4)
        code, details, _ = await refused((await lab.stub(gateway)).Generate(request()))
        assert (code, details) == (Code.UNAVAILABLE, "The worker went away before the first token.")
        assert sum(len(worker.requests) for worker in workers) == 2

    async def test_no_other_worker(self, lab):
        worker = await lab.worker([Code.UNAVAILABLE])
        code, details, _ = await refused((await lab.stub(await lab.gateway([worker]))).Generate(request()))
        assert code == Code.UNAVAILABLE
        assert details == "The worker went away before the first token. No other worker is ready."
        assert len(worker.requests) == 1

    async def test_lost_after_a_token_is_not_repeated(self, lab):
        workers = [await lab.worker([5, Code.UNAVAILABLE]) for _ in range(2)]
        gateway = await lab.gateway(workers)
        await eventually(lambda: len(gateway._pool.pairs()) == 2)
        call = (await lab.stub(gateway)).Generate(request())
        assert (await first(call)).index == 0
        code, details, _ = await refused(call)
        assert code == Code.UNAVAILABLE
        assert "after 1 tokens" in details
        assert sum(len(worker.requests) for worker in workers) == 1

    async def test_worker_dies_mid_stream(self, lab):
        worker = await lab.worker([5, 6, HANG])
        gateway = await lab.gateway([worker])
        call = (await lab.stub(gateway)).Generate(request())
        await first(call)
        await first(call)
        await worker.stop()
        async with asyncio.timeout(2):
            code, details, _ = await refused(call)
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
        got, details, _ = await refused((await lab.stub(await lab.gateway([worker]))).Generate(request()))
        assert got == told
        assert ("these details" in details) == passes
        assert len(worker.requests) == 1


class TestSilence:
    """No connection is closed; only keepalive can notice."""

    async def test_worker_falls_silent(self, lab):
        worker = await lab.worker([5, 6, HANG])
        wire = await lab.wire(worker.port)
        gateway = await lab.gateway([wire.address])
        call = (await lab.stub(gateway)).Generate(request())
        await first(call)
        wire.cut()
        started = time.monotonic()
        code, _, _ = await refused(call)
        assert code == Code.UNAVAILABLE
        assert time.monotonic() - started < 5
        assert gateway.problem

    async def test_client_falls_silent(self, lab):
        worker = await lab.worker([5, HANG])
        gateway = await lab.gateway([worker])
        wire = await lab.wire(gateway.port)
        call = (await lab.stub(wire)).Generate(request())
        await first(call)
        wire.cut()
        await eventually(lambda: worker.num_cancelled == 1, 5)
        call.cancel()


class TestOtherMethods:
    async def test_count_tokens(self, lab):
        gateway = await lab.gateway(["127.0.0.1:9"], serving=False)  # needs no worker
        stub = await lab.stub(gateway)
        reply = await stub.CountTokens(inference_pb2.CountTokensRequest(text="x " * 1000))
        assert (reply.tokens, reply.max_model_len) == (len(lab.ids("x " * 1000)), lab.MAX_MODEL_LEN)
        chat = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="Hi")])
        reply = await stub.CountTokens(inference_pb2.CountTokensRequest(chat=chat))
        assert reply.tokens > 20
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CountTokens(inference_pb2.CountTokensRequest(text=""))
        assert caught.value.code() == Code.INVALID_ARGUMENT

    async def test_list_models(self, lab):
        stub = await lab.stub(await lab.gateway([await lab.worker()]))
        reply = await stub.ListModels(inference_pb2.ListModelsRequest())
        (model,) = reply.models
        assert (model.id, model.max_model_len, model.effective_bits, model.kernels) == (
            "demo",
            lab.MAX_MODEL_LEN,
            2.75,
            "reference",
        )


class TestServer:
    async def test_stop_lets_running_requests_end(self, lab):
        worker = await lab.worker([5, 0.3, lab.end(1)])
        gateway = await lab.gateway([worker])
        call = (await lab.stub(gateway)).Generate(request())
        await first(call)
        stopping = asyncio.create_task(gateway.stop(5))
        assert [chunk.finish_reason async for chunk in call] == ["stop"]
        await stopping

    async def test_taken_port(self, lab):
        gateway = await lab.gateway([await lab.worker()])
        with pytest.raises(OSError, match="cannot listen"):
            config = GatewayConfig(model_name="demo", decode_workers=(), port=gateway.port)
            await type(gateway)(config, tokenizer=lab.tokenizer, model=gateway._gateway._model).start()

    @pytest.mark.parametrize(
        "fields",
        [{"decode_workers": ("nohost",)}, {"port": 70_000}, {"model_name": ""}, {"poll_interval_s": 0}],
        ids=repr,
    )
    def test_bad_config(self, fields):
        with pytest.raises(ValueError, match=r"."):
            GatewayConfig(**{"model_name": "demo", "decode_workers": (), **fields})

    async def test_unforeseen_errors_do_not_quote_the_prompt(self, lab, caplog):
        gateway = await lab.gateway([await lab.worker()])

        def fail(request):
            raise KeyError(request.text)

        gateway._gateway._prompts.check = fail
        with caplog.at_level(logging.DEBUG):
            code, details, _ = await refused((await lab.stub(gateway)).Generate(request("canary-prompt")))
        assert code == Code.INTERNAL
        assert "canary-prompt" not in details + caplog.text
        assert "unforeseen KeyError" in caplog.text

    async def test_nothing_is_left_behind(self, lab):
        workers = [await lab.worker([5, 6, lab.end(2)]) for _ in range(2)]
        gateway = await lab.gateway(workers)
        async with AsyncClient(gateway.address) as client:
            await asyncio.gather(*(client.generate("Hi") for _ in range(20)))
            streams = [client.stream("Hi") for _ in range(10)]
            for stream in streams:
                await anext(stream)
                await stream.aclose()
        await eventually(lambda: gateway._gateway._answering.num_running == 0)
        assert not gateway._gateway._request_ids
        assert all(worker.num_outstanding == 0 for worker in gateway._pool._workers.values())
        await eventually(lambda: all(worker.num_running == 0 for worker in workers))
