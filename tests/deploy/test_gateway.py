"""The gateway over real sockets, in front of stand-in workers: answers, order, cancel, the server itself."""

import asyncio
import logging
import time

import grpc
import pytest

from kvferry.deploy.client import AsyncClient
from kvferry.deploy.config import GatewayConfig, RequestLimits
from kvferry.proto import inference_pb2, inference_pb2_grpc, worker_pb2

Code = grpc.StatusCode
HANG = 60.0
ROLE = {"decode": ("decode",), "prefill": ("prefill",)}


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
        chunks = [chunk async for chunk in stub.Generate(lab.request("Hello there", seed=5))]

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
        await lab.eventually(lambda: decode.num_running == 0)
        assert decode.num_cancelled == 0

    async def test_one_worker_prefills_by_itself(self, lab):
        worker = await lab.worker([lab.end(0)])
        for prefill in ([], [worker]):
            stub = await lab.stub(await lab.gateway([worker], prefill))
            assert [chunk async for chunk in stub.Generate(lab.request())]
        assert [sent.prefill_address for sent in worker.requests] == ["", ""]

    async def test_a_worker_that_ends_its_call_late_is_not_cancelled(self, lab):
        worker = await lab.worker([lab.end(0), 0.2])
        stub = await lab.stub(await lab.gateway([worker]))
        assert [chunk async for chunk in stub.Generate(lab.request())]
        await lab.eventually(lambda: worker.num_running == 0)
        assert worker.num_cancelled == 0

    async def test_length_flushes_an_incomplete_character(self, lab):
        incomplete = lab.ids("🤖")[0]
        stub = await lab.stub(await lab.gateway([await lab.worker([lab.end(0, incomplete, "length")])]))
        (chunk,) = [chunk async for chunk in stub.Generate(lab.request(max_tokens=1))]
        assert (chunk.text, chunk.finish_reason) == ("\ufffd", "length")

    async def test_ttft_is_when_the_first_token_came(self, lab):
        stub = await lab.stub(await lab.gateway([await lab.worker([0.2, 5, 0.2, lab.end(1)])]))
        chunks = [chunk async for chunk in stub.Generate(lab.request())]
        usage = chunks[-1].usage
        assert usage.ttft_seconds >= 0.2
        assert usage.e2e_seconds >= usage.ttft_seconds + 0.15

    async def test_tokens_are_not_held_back(self, lab):
        stub = await lab.stub(await lab.gateway([await lab.worker([5, HANG])]))
        call = stub.Generate(lab.request())
        async with asyncio.timeout(2):
            assert (await lab.first(call)).index == 0
        call.cancel()


class TestStop:
    async def test_stop_string_across_tokens_ends_the_decode_call(self, lab):
        worker = await lab.worker([*lab.ids("One two three four five"), *[5] * 5, HANG])
        stub = await lab.stub(await lab.gateway([worker]))
        chunks = [chunk async for chunk in stub.Generate(lab.request(stop=["o three f", "zzz"], seed=1))]
        assert "".join(chunk.text for chunk in chunks) == "One tw"
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        assert chunks[-1].finish_reason == "stop"
        assert chunks[-1].usage.completion_tokens == len(chunks) == len(lab.ids("One two three four"))
        await lab.eventually(lambda: worker.num_cancelled == 1)

    async def test_usage_sent_early_survives_a_stop_string(self, lab):
        start, *rest = lab.ids("Stop here please")
        usage = worker_pb2.DecodeUsage(handoff_bytes=77)
        worker = await lab.worker([worker_pb2.TokenChunk(token_id=start, usage=usage), *rest, HANG])
        stub = await lab.stub(await lab.gateway([worker]))
        chunks = [chunk async for chunk in stub.Generate(lab.request(stop=[" here"]))]
        assert chunks[-1].usage.kv_bytes_moved == 77

    async def test_held_text_comes_when_the_answer_ends(self, lab):
        stub = await lab.stub(await lab.gateway([await lab.worker(lab.text_script("Well </e"))]))
        chunks = [chunk async for chunk in stub.Generate(lab.request(stop=["</end>"]))]
        assert "".join(chunk.text for chunk in chunks) == "Well </e"

    async def test_min_tokens_come_before_stop_strings(self, lab):
        script = lab.text_script("a b a b a b a b")
        stub = await lab.stub(await lab.gateway([await lab.worker(script)]))
        chunks = [chunk async for chunk in stub.Generate(lab.request(stop=[" b"], min_tokens=5))]
        assert "".join(chunk.text for chunk in chunks) == "a b a b a"
        assert len(chunks) == 6

    @pytest.mark.parametrize("ignore_eos", [False, True])
    async def test_end_tokens(self, lab, ignore_eos):
        worker = await lab.worker(lab.text_script("a"))
        stub = await lab.stub(await lab.gateway([worker]))
        async for _ in stub.Generate(lab.request(stop_token_ids=[9, 9], ignore_eos=ignore_eos)):
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
        code, details, _ = await lab.refused(stub.Generate(lab.request(max_tokens=4)))
        assert code == Code.DATA_LOSS
        assert sentence in details
        await lab.eventually(lambda: worker.num_running == 0)
        assert len(worker.requests) == 1


class TestCancel:
    @pytest.mark.parametrize("num_tokens", [0, 1, 5])
    async def test_client_cancel_reaches_the_worker(self, lab, num_tokens):
        worker = await lab.worker([*[5] * num_tokens, HANG])
        stub = await lab.stub(await lab.gateway([worker]))
        call = stub.Generate(lab.request())
        for _ in range(num_tokens):
            await lab.first(call)
        await lab.eventually(lambda: worker.num_running == 1)
        call.cancel()
        await lab.eventually(lambda: worker.num_cancelled == 1)

    async def test_client_deadline_reaches_the_worker(self, lab):
        worker = await lab.worker([5, HANG])
        stub = await lab.stub(await lab.gateway([worker]))
        started = time.monotonic()
        code, _, _ = await lab.refused(stub.Generate(lab.request(), timeout=0.3))
        assert code == Code.DEADLINE_EXCEEDED
        assert time.monotonic() - started < 10
        await lab.eventually(lambda: worker.num_cancelled == 1)

    async def test_default_deadline(self, lab):
        worker = await lab.worker([5, HANG])
        gateway = await lab.gateway([worker], limits=RequestLimits(default_timeout_s=0.3))
        code, details, _ = await lab.refused((await lab.stub(gateway)).Generate(lab.request()))
        assert (code, bool(details)) == (Code.DEADLINE_EXCEEDED, True)
        await lab.eventually(lambda: worker.num_cancelled == 1)

    async def test_deadline_passes_while_queued(self, lab):
        worker = await lab.worker([5, HANG])
        gateway = await lab.gateway([worker], limits=RequestLimits(max_concurrent=1, default_timeout_s=0.3))
        stub = await lab.stub(gateway)
        running = stub.Generate(lab.request(), timeout=30)
        await lab.first(running)
        assert (await lab.refused(stub.Generate(lab.request())))[0] == Code.DEADLINE_EXCEEDED
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
            call = inference_pb2_grpc.InferenceStub(channel).Generate(lab.request(max_tokens=501, top_logprobs=20))
            await lab.first(call)
            await lab.eventually(lambda: gateway._gateway._answering.num_running == 0)
            num_read = 1
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    num_read += 1
        assert caught.value.code() == Code.RESOURCE_EXHAUSTED
        assert "read nothing for 0.3 s" in caught.value.details()
        assert num_read < 400


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
        call = (await lab.stub(gateway)).Generate(lab.request())
        await lab.first(call)
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
            code, details, _ = await lab.refused((await lab.stub(gateway)).Generate(lab.request("canary-prompt")))
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
        await lab.eventually(lambda: gateway._gateway._answering.num_running == 0)
        assert not gateway._gateway._running.num_running
        assert all(worker.num_outstanding == 0 for worker in gateway._pool._workers.values())
        await lab.eventually(lambda: all(worker.num_running == 0 for worker in workers))
