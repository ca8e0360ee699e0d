"""One call to a decode worker, and what its failures mean to the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack

import grpc

from kvferry.deploy.answers import Answers
from kvferry.deploy.errors import (
    BrokenStream,
    DeadlineExceeded,
    InvalidRequest,
    NoWorker,
    Overloaded,
    RequestError,
    WorkerDraining,
    WorkerFailed,
    WorkerLost,
)
from kvferry.deploy.worker_pool import WorkerPair
from kvferry.proto import inference_pb2, worker_pb2
from kvferry.proto.attempts import is_draining
from kvferry.proto.trailing_metadata import retry_after_ms

_END_OF_STREAM_S = 1.0
_MAX_DETAILS = 300
_DEFAULT_RETRY_MS = 1_000


async def decode(
    pair: WorkerPair, request: worker_pb2.DecodeRequest, answers: Answers, deadline: float
) -> AsyncGenerator[inference_pb2.GenerateChunk, None]:
    """The chunks of all answers, each to its end or to a stop string. Leaving early cancels the call at once.

    Raises `WorkerLost` when the decode worker is given up, or the prefill worker before the first token.
    """
    worker, prefill = pair
    answers.start_worker(request.attempt)
    call = worker.decode.Generate(request, timeout=max(deadline - time.monotonic(), 0.001))
    waiting = ExitStack()
    waiting.enter_context(worker.ending(call.cancel))
    prefilling = waiting.enter_context(ExitStack())
    if prefill is not None:
        prefilling.enter_context(prefill.ending(call.cancel))
    try:
        async for worker_chunk in call:
            prefilling.close()
            chunk = answers.add(worker_chunk)
            if chunk is not None:
                yield chunk
            if answers.ended_by_worker:
                await _end_of_stream(call)
            if answers.finished:
                return
        raise BrokenStream(f"The worker's answer broke off after {answers.num_tokens} tokens without a finish reason.")
    except grpc.aio.AioRpcError as error:
        raise request_error(error, num_tokens=answers.num_tokens) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise _lost(
            answers.num_tokens
        ) from None  # not we are cancelled: the worker's channel was closed, or the worker given up
    finally:
        waiting.close()
        call.cancel()


def request_error(error: grpc.aio.AioRpcError, *, num_tokens: int) -> RequestError:
    """What the client is told. Details pass only where workers write them for callers."""
    match error.code():
        case grpc.StatusCode.UNAVAILABLE if is_draining(error):
            return WorkerDraining("The worker is about to end and takes no new requests.")
        # A worker that does not know our token, or its prefill worker's: others may.
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED | grpc.StatusCode.UNAUTHENTICATED:
            return _lost(num_tokens)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"The request's time was over after {num_tokens} tokens.")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(f"The worker is full: {_details(error)}", retry_after_ms=_retry_after_ms(error))
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(f"The worker refuses the request: {_details(error)}")
        case grpc.StatusCode.FAILED_PRECONDITION:
            return NoWorker(f"The workers do not fit together: {_details(error)}")
        case grpc.StatusCode.DATA_LOSS:
            return BrokenStream(f"The worker found data missing or damaged after {num_tokens} tokens.")
        case code:
            return WorkerFailed(f"The worker failed with {code.name} after {num_tokens} tokens.")


def _lost(num_tokens: int) -> WorkerLost:
    if num_tokens == 0:
        return WorkerLost("The worker went away before the first token.")
    return WorkerLost(f"The worker went away after {num_tokens} tokens.")


def _details(error: grpc.aio.AioRpcError) -> str:
    return (error.details() or "it gives no reason")[:_MAX_DETAILS]


def _retry_after_ms(error: grpc.aio.AioRpcError) -> int:
    return int(retry_after_ms(error.trailing_metadata()) or _DEFAULT_RETRY_MS)


async def _end_of_stream(call: grpc.aio.Call) -> None:
    """Lets the worker end its stream by itself, so that it does not see a cancel."""
    try:
        async with asyncio.timeout(_END_OF_STREAM_S):
            await call.code()
    except TimeoutError:
        pass
