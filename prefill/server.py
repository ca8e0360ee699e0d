"""The prefill worker on the wire: `PrefillSession` behind the Prefill service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

import grpc

from kvferry.kernels.sampling import MAX_TOP_LOGPROBS, SampledToken, SamplingParams
from kvferry.kvstore.config import FRAME_BYTES
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.store import Store
from kvferry.prefill.admission import Held, check_room
from kvferry.prefill.chooser import MeasuredChooser
from kvferry.prefill.config import FetchMode, PrefillConfig
from kvferry.prefill.engine import PrefillEngine
from kvferry.prefill.errors import DeadlinePassed, QueueFull
from kvferry.prefill.fetch_policy import AlwaysFetch, FetchPolicy, NeverFetch
from kvferry.prefill.metrics import PrefillMetrics
from kvferry.prefill.pieces import Piece, PieceQueue, Seal
from kvferry.prefill.session import BlockReady, Event, HandoffReady, PrefillSession, PrefillUsage
from kvferry.proto import worker_pb2, worker_pb2_grpc
from kvferry.proto.attempts import Attempts, CallEnded
from kvferry.proto.request_id import bind_request_id
from kvferry.proto.trailing_metadata import RETRY_AFTER_KEY

logger = logging.getLogger(__name__)

MAX_ANSWERS = 128
"""Answers to one prompt."""
START_TIMEOUT_S = 10.0
"""How long a stream may be open before it says what it wants."""
LAST_WRITE_S = 5.0
"""How long a call that ends waits for a caller to take the message that is being written."""

FETCH_POLICIES: dict[FetchMode, Callable[[], FetchPolicy]] = {
    "measured": MeasuredChooser,
    "always": AlwaysFetch,
    "never": NeverFetch,
}

Context = grpc.aio.ServicerContext[worker_pb2.PrefillCommand, worker_pb2.PrefillEvent]


class PrefillServicer(worker_pb2_grpc.PrefillServicer):
    """Admits requests and translates between sessions and the stream. Holds no per-request state of its own."""

    def __init__(
        self,
        *,
        engine: PrefillEngine,
        store: Store | None,
        info: worker_pb2.WorkerInfo,
        config: PrefillConfig,
        cache_blocks: int = 0,
    ) -> None:
        """`cache_blocks`: how many blocks `store` keeps in this process."""
        self._cache_blocks = cache_blocks
        self._engine = engine
        self._store = store
        self._info = info
        self._config = config
        self._running: dict[asyncio.Task[None], Held] = {}
        self.attempts = Attempts()
        """The calls that run here; publishing may go on after them."""
        self.fetch_policy: FetchPolicy = FETCH_POLICIES[config.fetch]()
        """Decides for every request whether its cached blocks are fetched."""
        self.metrics = PrefillMetrics(info.model_name)

    @property
    def num_requests(self) -> int:
        """Requests that are computing or publishing."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Of these, those that wait for their first turn."""
        return self._engine.num_waiting

    @property
    def num_held_tokens(self) -> int:
        """Prompt tokens of these requests."""
        return sum(held.num_tokens for held in self._running.values())

    @property
    def backlog_s(self) -> float:
        """How long the engine will take for what it has, by the speed of its last passes."""
        return self._engine.seconds_left

    def stats(self) -> worker_pb2.PrefillStats:
        """What this worker is doing, and what it has measured."""
        counters, estimates = self.fetch_policy.counters, self.fetch_policy.estimates()
        load = self._engine.load
        return worker_pb2.PrefillStats(
            num_requests=self.num_requests,
            num_fetches=counters.num_fetches,
            num_fetches_abandoned=counters.num_abandoned,
            num_recomputed=counters.num_recomputed,
            num_lookups_skipped=counters.num_lookups_skipped,
            num_probes=counters.num_probes,
            num_blocks_fetched=counters.num_blocks_fetched,
            num_blocks_recomputed=counters.num_blocks_recomputed,
            fetch_bytes_per_second=estimates.bytes_per_s,
            fetch_latency_seconds=estimates.latency_s,
            lookup_seconds=estimates.lookup_s,
            block_compute_seconds=self._engine.seconds_for(0, self._info.block_size),
            num_computing=load.num_jobs,
            queued_tokens=load.queued_tokens,
            queued_seconds=load.queued_s,
            token_seconds=load.token_s,
            context_token_seconds=load.context_token_s,
            uses_store=self._store is not None and self._config.fetch != "never",
            cache_blocks=self._cache_blocks,
            computed_tokens=load.computed_tokens,
            compute_seconds=load.compute_s,
            num_blocks_shared=load.num_shared_blocks,
            num_blocks_local=counters.num_blocks_local,
        )

    async def Prefill(  # type: ignore[override]  # the stubs know generators only; this one reads and writes at once
        self, request_iterator: AsyncIterator[worker_pb2.PrefillCommand], context: Context
    ) -> None:
        start = await self._read_start(context)
        bind_request_id(start.request_id)
        try:
            with self.attempts.running(start.tenant, start.request_id, start.attempt):
                await self._check(start, context)
                await self._run(start, context)
        except CallEnded as error:
            await context.abort(error.code, str(error), trailing_metadata=error.metadata)

    async def _run(self, start: worker_pb2.PrefillStart, context: Context) -> None:
        try:
            await self._serve(start, context)
        except TimeoutError:
            message = f"the handoff was not taken within {self._config.handoff_timeout_s} s; its blocks are released"
            await context.abort(grpc.StatusCode.ABORTED, message)
        except DeadlinePassed as error:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        except Exception as error:  # the edge: whatever failed, the caller is told
            logger.exception("a prefill request failed")
            await context.abort(grpc.StatusCode.INTERNAL, f"prefill failed: {error}")

    async def _read_start(self, context: Context) -> worker_pb2.PrefillStart:
        command = None
        with suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S):
                command = await _read(context)
        if command is None or command.WhichOneof("command") != "start":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be `start`")
        return command.start

    async def _check(self, start: worker_pb2.PrefillStart, context: Context) -> None:
        """Ends the call with a status when the request cannot be served here."""
        n = len(start.token_ids)
        if start.identity != self._info.identity:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                "this prefill worker serves another model, tokenizer, quantization spec, layout or numerics class; "
                "start all workers from the same configuration",
            )
        if not 0 < n < self._info.max_model_len:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{n} prompt tokens; this model takes 1 to {self._info.max_model_len - 1}",
            )
        if max(start.token_ids) >= self._engine.vocab_size:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a token id is not below {self._engine.vocab_size}")
        if start.sampling.top_logprobs > MAX_TOP_LOGPROBS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"top_logprobs must be at most {MAX_TOP_LOGPROBS}")
        if not start.tenant:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "tenant is empty")
        if start.sampling.n > MAX_ANSWERS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"n must be at most {MAX_ANSWERS}")
        if n > self._config.max_prompt_tokens_in_flight:
            limit = self._config.max_prompt_tokens_in_flight
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"{n} prompt tokens; this prefill worker has memory for {limit}"
            )
        try:
            check_room(self._running.values(), _held(start), self._config, self._engine.seconds_left)
        except QueueFull as error:
            hint = ((RETRY_AFTER_KEY, str(error.retry_after_ms)),)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), trailing_metadata=hint)

    async def _serve(self, start: worker_pb2.PrefillStart, context: Context) -> None:
        session = PrefillSession(
            token_ids=list(start.token_ids),
            sampling=SamplingParams.of(start.sampling),
            namespace=namespace_of(self._info.identity, tenant=start.tenant, block_size=self._info.block_size),
            engine=self._engine,
            store=self._store,
            fetch_policy=self.fetch_policy,
            config=self._config,
            remaining_s=context.time_remaining(),
            priority=start.priority,
            warm=start.warm,
            num_answers=start.sampling.n or 1,
            pieces_of=start.pieces.blocks if start.HasField("pieces") else None,
        )
        # Else they go with the first message, and when that one's task is cancelled, gRPC sends them again with the
        # status, fails (TOO_MANY_OPERATIONS), and the caller waits for its deadline (grpcio 1.85).
        await context.send_initial_metadata(())
        write_lock = asyncio.Lock()
        compute = asyncio.create_task(session.run())
        self._admit(compute, _held(start))
        compute.add_done_callback(lambda task: self._count(task, session, start))
        events = asyncio.create_task(_send_events(session, context, write_lock))
        commands = asyncio.create_task(_answer_commands(session, context, write_lock))
        sending = [events, commands]
        if session.pieces is not None:
            sending.append(asyncio.create_task(_send_pieces(session.pieces, context, write_lock)))
        try:
            await _until_done(events, compute, *sending)
            # Everything is announced; the caller may still take blocks until it half-closes.
            async with asyncio.timeout(self._config.handoff_timeout_s):
                await _until_done(commands, *sending)
        finally:
            # A write that is cancelled half-way goes on inside gRPC, and the call's status could not be sent beside it:
            # the caller would wait for ever. Nothing is written any more once the lock is ours.
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WRITE_S):
                    await write_lock.acquire()
            stopping = sending if session.handed_over else [*sending, compute]
            for task in stopping:
                task.cancel()
            await asyncio.gather(*stopping, return_exceptions=True)
            session.close()

    def _admit(self, compute: asyncio.Task[None], held: Held) -> None:
        """Counts a request until its computing and publishing are over: that may be after the call."""
        self._running[compute] = held

        def leave(task: asyncio.Task[None]) -> None:
            del self._running[task]
            if not task.cancelled() and task.exception() is not None:
                logger.warning("a prefill request ended with %s", type(task.exception()).__name__)

        compute.add_done_callback(leave)

    def _count(self, task: asyncio.Task[None], session: PrefillSession, start: worker_pb2.PrefillStart) -> None:
        if task.cancelled() or task.exception() is not None:
            self.metrics.failed()
            return
        usage = session.usage
        logger.debug(
            "prompt finished",
            extra={
                "fields": {
                    "prompt_tokens": len(start.token_ids),
                    "cached_tokens": usage.num_cached_tokens,
                    "queue_s": round(usage.queue_seconds, 4),
                    "fetch_s": round(usage.fetch_seconds, 4),
                    "prefill_s": round(usage.compute_seconds, 4),
                }
            },
        )
        self.metrics.finished(
            usage,
            num_tokens=len(start.token_ids),
            block_size=self._info.block_size,
            bf16_bytes_per_token=self._info.kv_bytes_per_token_bf16,
            warm=start.warm,
        )


def _held(start: worker_pb2.PrefillStart) -> Held:
    return Held(tenant=start.tenant, warm=start.warm, num_tokens=len(start.token_ids))


async def _read(context: Context) -> worker_pb2.PrefillCommand | None:
    """The caller's next command; None when it has half-closed."""
    command: object = await context.read()
    return command if isinstance(command, worker_pb2.PrefillCommand) else None


async def _until_done(wanted: asyncio.Task[None], *others: asyncio.Task[None]) -> None:
    """Waits until `wanted` is done; raises the first exception of any of the tasks."""
    waiting = {wanted, *others}
    while not wanted.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


async def _send_events(session: PrefillSession, context: Context, lock: asyncio.Lock) -> None:
    while True:
        event = await session.next_event()
        async with lock:
            for message in event_to_pb(event):
                await context.write(message)
        if isinstance(event, PrefillUsage):
            return


async def _send_pieces(pieces: PieceQueue, context: Context, lock: asyncio.Lock) -> None:
    """Sends what is packed, until it is cancelled: the caller half-closes when it has everything. The lock is fair, so
    an event waits for one message of pieces at most."""
    while True:
        for message in pieces_to_pb(await pieces.next()):
            async with lock:
                await context.write(message)


async def _answer_commands(session: PrefillSession, context: Context, lock: asyncio.Lock) -> None:
    """Sends the blocks that the caller asks for, until it half-closes."""
    while (command := await _read(context)) is not None:
        for index in command.send_blocks.indices:
            await session.until_complete(index)
            record = memoryview(session.record(index))
            async with lock:
                for offset in range(0, len(record), FRAME_BYTES):
                    frame = worker_pb2.BlockFrame(
                        index=index,
                        record_bytes=len(record) if offset == 0 else 0,
                        chunk=bytes(record[offset : offset + FRAME_BYTES]),
                    )
                    await context.write(worker_pb2.PrefillEvent(block=frame))


def event_to_pb(event: Event) -> Iterator[worker_pb2.PrefillEvent]:
    """The messages that carry one event."""
    match event:
        case BlockReady(index, in_store):
            ready = worker_pb2.BlockReady(index=index, in_store=in_store)
            yield worker_pb2.PrefillEvent(block_ready=ready)
        case HandoffReady(tokens, tail_bytes, tail, usage):
            first, *others = (token_to_pb(token, choice) for choice, token in enumerate(tokens))
            handoff = worker_pb2.Handoff(
                first_token=first,
                other_first_tokens=others,
                tail_bytes=tail_bytes,
                usage=worker_pb2.PrefillUsage(**vars(usage)),
            )
            yield worker_pb2.PrefillEvent(handoff=handoff)
            for offset in range(0, len(tail), FRAME_BYTES):
                yield worker_pb2.PrefillEvent(tail_chunk=tail[offset : offset + FRAME_BYTES])
        case _:
            yield worker_pb2.PrefillEvent(finished=worker_pb2.PrefillUsage(**vars(event)))


def pieces_to_pb(parts: list[Piece | Seal]) -> Iterator[worker_pb2.PrefillEvent]:
    """The messages that carry `parts`: the pieces together, then the seals."""
    pieces = [
        worker_pb2.BlockPiece(index=part.index, offset=part.offset, crc32=part.crc32, data=part.data)
        for part in parts
        if isinstance(part, Piece)
    ]
    if pieces:
        yield worker_pb2.PrefillEvent(pieces=worker_pb2.BlockPieces(pieces=pieces))
    for part in parts:
        if isinstance(part, Seal):
            yield worker_pb2.PrefillEvent(seal=worker_pb2.BlockSeal(index=part.index, checksum=part.checksum))


def token_to_pb(token: SampledToken, choice: int) -> worker_pb2.TokenChunk:
    """The first token of answer `choice`."""
    return worker_pb2.TokenChunk(
        index=0,
        choice=choice,
        token_id=token.token_id,
        logprob=token.logprob or 0.0,
        top_logprobs=[worker_pb2.TokenLogprob(token_id=i, logprob=p) for i, p in token.top_logprobs],
    )
