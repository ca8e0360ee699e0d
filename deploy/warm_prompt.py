"""Has a prefill worker compute and publish a prompt's complete blocks ahead of the request that will need them."""

from __future__ import annotations

import asyncio

import grpc

from kvferry.deploy.decode_call import request_error
from kvferry.deploy.errors import BrokenStream, WorkerLost
from kvferry.deploy.worker_pool import PooledWorker
from kvferry.proto import worker_pb2, worker_pb2_grpc


async def warm_prompt(
    worker: PooledWorker, token_ids: list[int], *, request_id: str, tenant: str, priority: int, timeout_s: float
) -> worker_pb2.PrefillUsage:
    """Waits until the blocks are published. The worker computes them when it has nothing else to do.

    Raises a `RequestError` when the worker refuses, fails or is lost. Leaving early cancels the work.
    """
    start = worker_pb2.PrefillStart(
        request_id=request_id,
        tenant=tenant,
        token_ids=token_ids,
        identity=worker.info.identity if worker.info else None,
        priority=priority,
        warm=True,
    )
    call = worker_pb2_grpc.PrefillStub(worker.channel).Prefill(timeout=timeout_s)
    try:
        await call.write(worker_pb2.PrefillCommand(start=start))
        await call.done_writing()
        async for event in call:
            if event.HasField("finished"):
                return event.finished
        raise BrokenStream("The prefill worker ended without a word on what it did.")
    except grpc.aio.AioRpcError as error:
        raise request_error(error, num_tokens=0) from None
    except asyncio.InvalidStateError:  # refused before the prompt was written
        raise await _refusal(call) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise WorkerLost("The worker went away.") from None  # its channel was closed
    finally:
        call.cancel()


async def _refusal(call: grpc.aio.StreamStreamCall[worker_pb2.PrefillCommand, worker_pb2.PrefillEvent]) -> Exception:
    status = grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
    )
    return request_error(status, num_tokens=0)
