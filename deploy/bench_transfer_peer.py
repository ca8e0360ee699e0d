"""One machine's workers and client in `kvferry bench transfer`: `python -m kvferry.deploy.bench_transfer_peer CONFIG`.

CONFIG is JSON. The model is loaded once and served by several workers. Commands and answers are lines of JSON on
standard input and output; the process ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc

from kvferry.decode.config import DecodeConfig
from kvferry.decode.prefill_peers import PrefillPeer
from kvferry.decode.prefill_stream import RemotePrefillStream
from kvferry.deploy.bench_transfer_lab import MAX_LINE_BYTES
from kvferry.deploy.spec_file import resolve_spec
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime, WorkerServer
from kvferry.prefill.config import PrefillConfig
from kvferry.proto import worker_pb2, worker_pb2_grpc
from kvferry.proto.peer_security import PeerSecurity

IDLE_TIMEOUT_S = 120.0
FETCH_TIMEOUT_S = 600.0
"""Of a whole fetch: at 100 Mbit/s an unquantized prompt takes longer than any user would wait."""
KV_MEMORY = 768 * 2**20


class TimedPrefillStream(RemotePrefillStream):
    """Notes when what came, and can do without streaming: the request id begins with how.

    "streamed": as always. "store": no pieces, blocks come through the store as they are announced. "unstreamed": no
    pieces either, and no block is asked for before prefill has handed over; then all come from prefill.
    """

    times: dict[str, dict[str, float]] = {}  # noqa: RUF012  # by request id, of this process
    """`started`, `handed_over` and `done` (everything is here), by time.monotonic()."""

    def __init__(self, peer: PrefillPeer, start: worker_pb2.PrefillStart, *, timeout_s: float) -> None:
        self._mode = start.request_id.partition(":")[0]
        if self._mode != "streamed":
            start.ClearField("pieces")
        self._times = self.times.setdefault(start.request_id, {})
        super().__init__(peer, start, timeout_s=timeout_s)

    async def start(self) -> None:
        self._times["started"] = time.monotonic()
        await super().start()

    async def done(self) -> None:
        self._times["done"] = time.monotonic()
        await super().done()

    async def events(self) -> AsyncIterator[worker_pb2.PrefillEvent]:
        held: list[worker_pb2.PrefillEvent] = []
        async for event in super().events():
            kind = event.WhichOneof("event")
            if kind == "block_ready" and self._mode == "unstreamed":
                event.block_ready.in_store = False
                if "handed_over" not in self._times:
                    held.append(event)
                    continue
            yield event
            if kind == "handoff":
                self._times["handed_over"] = time.monotonic()
                for ready in held:
                    yield ready


class Peer:
    """Workers over one runtime, and calls to them."""

    def __init__(self, runtime: ModelRuntime, stack: AsyncExitStack) -> None:
        self._runtime = runtime
        self._stack = stack
        self._servers: dict[str, WorkerServer] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.addresses: dict[str, str] = {}

    async def add(self, name: str, *, role: str, host: str, store: str | None) -> None:
        """Starts a worker of the role "prefill", "decode" or "both"."""
        prefill = PrefillConfig(host=host, fetch="always", fetch_timeout_s=FETCH_TIMEOUT_S, lookup_timeout_s=2.0)
        decode = DecodeConfig(
            host=host,
            kv_memory=KV_MEMORY,
            max_num_seqs=2,
            prefix_caching=False,
            publish_answers=False,
            fetch_timeout_s=FETCH_TIMEOUT_S,
        )
        server = WorkerServer(
            self._runtime,
            config=prefill if role == "prefill" else decode,
            store_address=store,
            own_prefill=prefill if role == "both" else None,
            remote_prefill=TimedPrefillStream,
            security=PeerSecurity(insecure=True),  # in the lab's own network
        )
        self.addresses[name] = await server.start()
        self._stack.push_async_callback(server.stop, 0.2)
        self._servers[name] = server
        channel = grpc.aio.insecure_channel(self.addresses[name])
        self._stack.push_async_callback(channel.close)
        self._channels[name] = channel

    async def generate(
        self, *, server: str, prefill: str, request_id: str, token_ids: list[int], max_tokens: int, timeout_s: float
    ) -> dict[str, Any]:
        """One request as a client of this machine sees it. "recompute" has a tenant of its own: the workers of this
        process share the blocks that they hold."""
        how = request_id.partition(":")[0]
        request = worker_pb2.DecodeRequest(
            request_id=request_id,
            tenant="recompute" if how == "recompute" else "bench",
            token_ids=token_ids,
            sampling=worker_pb2.SamplingParams(max_tokens=max_tokens),
            prefill_address=prefill,
        )
        started = time.monotonic()
        arrivals: list[float] = []
        tokens: list[int] = []
        usage = worker_pb2.DecodeUsage()
        async for chunk in worker_pb2_grpc.DecodeStub(self._channels[server]).Generate(request, timeout=timeout_s):
            arrivals.append(time.monotonic())
            tokens.append(chunk.token_id)
            usage = chunk.usage
        times = TimedPrefillStream.times.pop(request_id, {})
        computing = usage.prefill.queue_seconds + usage.prefill.fetch_seconds + usage.prefill.compute_seconds
        return {
            "tokens": tokens,
            "ttft_s": arrivals[0] - started,
            "jct_s": arrivals[-1] - started,
            "transfer_s": usage.transfer_seconds,
            "after_prefill_s": times["done"] - times["started"] - computing if "done" in times else None,
            "fetch_s": usage.prefill.fetch_seconds,
            "cached_tokens": usage.prefill.num_cached_tokens,
        }

    async def idle(self) -> dict[str, Any]:
        """Waits until nothing is computed or published any more."""
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            while any(server.stats().prefill.num_requests for server in self._servers.values()):
                await asyncio.sleep(0.02)
        return {}


async def _serve(config: dict[str, Any]) -> None:
    spec = resolve_spec(config["preset"], block_size=config["block_size"])
    runtime = await asyncio.to_thread(ModelRuntime, ModelConfig(model=config["model"], spec=spec))
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with AsyncExitStack() as stack:
        peer = Peer(runtime, stack)
        for server in config["servers"]:
            await peer.add(**server)
        info = runtime.info(roles=[])
        _say(
            {
                "addresses": peer.addresses,
                "max_model_len": info.max_model_len,
                "block_size": info.block_size,
                "vocab_size": runtime.model.vocab_size,
            }
        )
        commands: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {"generate": peer.generate, "idle": peer.idle}
        while line := await reader.readline():
            command = json.loads(line)
            try:
                _say(await commands[command.pop("do")](**command))
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                said = error.details() if isinstance(error, grpc.aio.AioRpcError) else "not done in time"
                _say({"error": said})
    runtime.close()


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    asyncio.run(_serve(json.loads(sys.argv[1])))
