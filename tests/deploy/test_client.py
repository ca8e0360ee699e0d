import asyncio
import subprocess
import sys
import threading

import grpc
import pytest

from kvferry.deploy import client as client_module
from kvferry.deploy.client import (
    AsyncClient,
    Client,
    ClientError,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    ServerError,
    Unavailable,
)
from kvferry.deploy.config import RequestLimits
from kvferry.proto import inference_pb2, inference_pb2_grpc, worker_pb2

TEXT = "Hello 🤖 world"


@pytest.fixture
async def served(lab):
    worker = await lab.worker(lab.text_script(TEXT))
    gateway = await lab.gateway([worker])
    return worker, gateway


async def in_thread(function, *arguments, **options):
    """The gateway lives in this event loop, so the sync client needs a thread."""
    return await asyncio.to_thread(function, *arguments, **options)


async def test_async_generate(lab, served):
    async with AsyncClient(served[1].address) as client:
        answer = await client.generate("Hi", seed=7)
    assert answer.text == TEXT
    assert answer.token_ids == (*lab.ids(TEXT), lab.EOS)
    assert answer.finish_reason == "stop"
    assert answer.logprobs == ()
    assert answer.usage.seed == 7
    assert answer.usage.prompt_tokens == len(lab.ids("Hi"))
    assert answer.usage.completion_tokens == len(answer.token_ids)
    assert 0 < answer.usage.ttft_seconds <= answer.usage.e2e_seconds


async def test_sync_does_the_same(lab, served):
    def use():
        with Client(served[1].address) as client:
            answer = client.generate(messages=[{"role": "user", "content": "Hi"}])
            chunks = list(client.stream(token_ids=[5, 6]))
            count = client.count_tokens("Hi there")
            return answer, chunks, count, client.models()

    answer, chunks, count, models = await in_thread(use)
    assert answer.text == "".join(chunk.text for chunk in chunks) == TEXT
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert (count.tokens, count.max_model_len) == (2, lab.MAX_MODEL_LEN)
    assert [(m.id, m.max_model_len, m.effective_bits, m.kernels) for m in models] == [
        ("demo", lab.MAX_MODEL_LEN, 2.75, "reference")
    ]


async def test_all_sampling_arguments_arrive(lab, served):
    worker, gateway = served
    options = {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 3,
        "min_p": 0.25,
        "seed": 2**64 - 1,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "min_tokens": 2,
    }
    async with AsyncClient(gateway.address) as client:
        await client.generate("Hi", stop="###", stop_token_ids=[7], top_logprobs=0, ignore_eos=True, **options)
    sampling = worker.requests[0].sampling
    assert {name: getattr(sampling, name) for name in options} == options
    assert list(sampling.stop_token_ids) == [7]
    assert sampling.logprobs


async def test_defaults(lab, served):
    worker, gateway = served
    async with AsyncClient(gateway.address) as client:
        first, second = await client.generate("Hi"), await client.generate("Hi")
    sampling = worker.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (256, 0, 1, 1)
    assert list(sampling.stop_token_ids) == [lab.EOS]
    assert not sampling.logprobs
    assert first.usage.seed != second.usage.seed
    assert first.usage.seed == worker.requests[0].sampling.seed < 2**63


async def test_logprobs(lab):
    script = [
        worker_pb2.TokenChunk(
            index=0,
            token_id=lab.ids(" a")[0],
            logprob=-0.5,
            top_logprobs=[worker_pb2.TokenLogprob(token_id=lab.ids(" b")[0], logprob=-1.5)],
        ),
        lab.end(1, logprob=-0.25),
    ]
    gateway = await lab.gateway([await lab.worker(script)])
    async with AsyncClient(gateway.address) as client:
        answer = await client.generate("Hi", top_logprobs=1)
    first, last = answer.logprobs
    assert (first.chosen.text, first.chosen.logprob) == (" a", -0.5)
    assert [(top.text, top.logprob) for top in first.top] == [(" b", -1.5)]
    assert (last.chosen.text, last.top) == ("<|im_end|>", ())


async def test_several_answers(lab):
    """Told apart by their choice, each with indexes, text and a finish reason of its own."""
    [a], [b] = lab.ids(" a"), lab.ids(" b")
    chunk = worker_pb2.TokenChunk
    worker = await lab.worker(
        [
            chunk(index=0, token_id=a, choice=0),
            chunk(index=0, token_id=b, choice=1),
            chunk(index=1, token_id=b, choice=1),
            chunk(index=1, token_id=lab.EOS, choice=0, finish_reason="stop"),
            chunk(index=2, token_id=b, choice=1, finish_reason="length"),
        ]
    )
    gateway = await lab.gateway([worker])
    async with AsyncClient(gateway.address) as client:
        answer = await client.generate("Hi", n=2, seed=5, priority=3)
    assert [choice.text for choice in answer.choices] == [" a", " b b b"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]
    assert (answer.text, answer.token_ids) == (" a", (a, lab.EOS))
    assert answer.usage.completion_tokens == 5
    [request] = worker.requests
    assert (request.sampling.n, request.sampling.seed, request.priority) == (2, 5, 3)


async def test_a_stop_string_ends_one_answer_and_not_the_others(lab):
    [a], [b] = lab.ids(" a"), lab.ids(" b")
    chunk = worker_pb2.TokenChunk
    order = [(0, 0, b), (1, 0, a), (0, 1, a), (1, 1, a), (0, 2, a), (1, 2, a)]
    script = [chunk(index=i, token_id=token, choice=c, finish_reason="length" * (i == 2)) for c, i, token in order]
    gateway = await lab.gateway([await lab.worker(script)])
    async with AsyncClient(gateway.address) as client:
        answer = await client.generate("Hi", n=2, stop=" b")
    assert [choice.text for choice in answer.choices] == ["", " a a a"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]


async def test_an_answer_that_was_not_asked_for(lab):
    worker = await lab.worker([worker_pb2.TokenChunk(index=0, token_id=5, choice=2)])
    gateway = await lab.gateway([worker])
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(ServerError, match="answer 2; 2 were due"):
            await client.generate("Hi", n=2)


async def test_closing_a_stream_cancels(lab):
    worker = await lab.worker([5, 6, 60.0, 7])
    gateway = await lab.gateway([worker])

    def use():
        with Client(gateway.address) as client:
            stream = client.stream("Hi")
            next(stream)
            stream.close()

    await in_thread(use)
    async with AsyncClient(gateway.address) as client:
        async for chunk in client.stream("Hi"):
            if chunk.index == 1:
                break
        for _ in range(100):
            if worker.num_cancelled == 2:
                break
            await asyncio.sleep(0.01)
    assert worker.num_cancelled == 2


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        pytest.param(None, {}, "exactly one", id="no-prompt"),
        pytest.param("a", {"token_ids": [1]}, "exactly one", id="two-prompts"),
        pytest.param("a\ud800", {}, "lone surrogates", id="surrogates"),
        pytest.param(None, {"messages": [{"role": "user"}]}, "messages dicts", id="message"),
        pytest.param(None, {"token_ids": [-1]}, "not negative", id="id"),
        pytest.param("a", {"seed": -1}, "seed cannot be -1", id="seed"),
        pytest.param("a", {"max_tokens": "many"}, "max_tokens cannot be a str", id="type"),
        pytest.param("a", {"stop": [1]}, "stop cannot be a list", id="stop"),
        pytest.param("a", {"temperature": 3.0}, "temperature is 3; allowed: 0 to 2", id="range"),
        pytest.param("", {}, "prompt is empty", id="empty"),
        pytest.param("a " * 600, {}, "model holds 512 tokens", id="long"),
    ],
)
async def test_invalid(served, prompt, options, sentence):
    async with AsyncClient(served[1].address) as client:
        with pytest.raises(InvalidRequest, match=sentence):
            await client.generate(prompt, **options)


async def test_misspelt_argument(served):
    async with AsyncClient(served[1].address) as client:
        with pytest.raises(TypeError, match="unknown arguments: max_token"):
            client.stream("Hi", max_token=3)
        with pytest.raises(TypeError, match="unknown arguments: temperature"):
            await client.count_tokens("Hi", temperature=1)


async def test_unknown_model(served):
    async with AsyncClient(served[1].address) as client:
        with pytest.raises(ModelNotFound, match="'demo' only"):
            await client.generate("Hi", model="other")


async def test_nobody_at_the_address():
    with Client("127.0.0.1:9") as client, pytest.raises(Unavailable, match=r"No gateway answers at 127.0.0.1:9"):
        await in_thread(client.generate, "Hi")


async def test_no_workers_is_said_by_the_gateway(lab):
    gateway = await lab.gateway(["127.0.0.1:9"], serving=False)
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(Unavailable, match=r"No decode worker is ready: 127.0.0.1:9"):
            await client.generate("Hi")
        assert await client.models() == []


async def test_timeout(lab):
    gateway = await lab.gateway([await lab.worker([5, 60.0])])
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(DeadlineExceeded):
            await client.generate("Hi", timeout=0.3)
        with pytest.raises(TimeoutError):
            await client.generate("Hi", timeout=0.3)


async def test_overload_tells_when_to_come_back(lab):
    worker = await lab.worker([5, 60.0])
    gateway = await lab.gateway([worker], limits=RequestLimits(max_concurrent=1, max_queued=0))
    async with AsyncClient(gateway.address) as client:
        running = client.stream("Hi")
        await anext(running)
        with pytest.raises(Overloaded, match="full: 1 requests run") as caught:
            await client.generate("Hi")
        await running.aclose()
    assert 0.1 <= caught.value.retry_after <= 30


@pytest.mark.parametrize(
    "indexes",
    [pytest.param([0, 2], id="gap"), pytest.param([0, 0], id="repeat"), pytest.param([0], id="no-end")],
)
async def test_the_client_checks_the_order_too(indexes):
    class BadGateway(inference_pb2_grpc.InferenceServicer):
        async def Generate(self, request, context):
            for index in indexes:
                yield inference_pb2.GenerateChunk(index=index, token_ids=[1])

        CountTokens = ListModels = None

    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(BadGateway(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        with pytest.raises(ServerError, match=r"was due|broke off"):
            await client.generate("Hi")
    await server.stop(None)


async def test_threads_share_a_client(served):
    results = []

    def use(client):
        results.append(client.generate("Hi").text)

    def run():
        with Client(served[1].address) as client:
            threads = [threading.Thread(target=use, args=(client,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    await in_thread(run)
    assert results == [TEXT] * 8


def test_needs_no_torch():
    program = (
        "import sys; from kvferry.deploy.client import Client; Client('127.0.0.1:1').close();"
        "sys.exit(bool({'torch', 'transformers', 'ray', 'numpy'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_exports():
    exported = client_module.__all__
    assert sorted(exported) == sorted(set(exported))
    assert all(hasattr(client_module, name) for name in exported)
    assert all(issubclass(error, ClientError) for error in (InvalidRequest, Overloaded, ServerError, Unavailable))
    assert issubclass(InvalidRequest, ValueError)
    assert issubclass(DeadlineExceeded, TimeoutError)
