"""One request: sent, read to its end, and timed token by token.

Uses the stub and not `AsyncClient`, because a benchmark needs the gRPC status of every outcome, and little between a
token's arrival and its time: reading a token costs 37 us of processor time in gRPC alone, 40 here and 45 in
`AsyncClient` (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from itertools import pairwise

import grpc

from kvferry.deploy.bench_serve.workload import PlannedRequest
from kvferry.deploy.client_messages import GenerateOptions, generate_request
from kvferry.proto import inference_pb2, inference_pb2_grpc

CANCEL_BEFORE_FIRST_TOKEN_S = 0.02  # long enough to reach a worker, too short for most first tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerUsage:
    """What the gateway says about a completed request."""

    prompt_tokens: int
    cached_tokens: int
    kv_bytes_moved: int
    kv_bytes_bf16: int
    ttft_s: float
    prefill_compute_s: float
    store_fetch_s: float
    transfer_s: float


@dataclass(kw_only=True, slots=True)
class Measured:
    """Times are seconds: `sent_s` from the start of the run, all others from the moment of sending.

    TTFT, TPOT, ITL and E2E latency are those of `calculate_metrics` in vllm/benchmarks/serve.py: TTFT from sending to
    the first token; TPOT, one value a request, the time from the first token to the last over the tokens after the
    first; ITL, one value a gap between two arrivals; E2E from sending to the last token.
    """

    planned: PlannedRequest
    due_s: float | None  # when it should have been sent; None: when there was a place
    sent_s: float = 0.0
    status: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    error: str = ""
    arrivals_s: list[float] = field(default_factory=list)  # of chunks with tokens; the gateway sends one a token
    num_tokens: int = 0
    ended_s: float = 0.0
    usage: ServerUsage | None = None  # of completed requests

    @property
    def completed(self) -> bool:
        return self.status is grpc.StatusCode.OK

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def e2e_s(self) -> float:
        return self.arrivals_s[-1]

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of one token."""
        return (self.e2e_s - self.ttft_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def itls_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.arrivals_s)]


class _BrokenAnswer(Exception):
    pass


def to_message(planned: PlannedRequest, *, model: str) -> inference_pb2.GenerateRequest:
    options: GenerateOptions = {
        "token_ids": planned.token_ids.tolist(),
        "model": model if planned.model is None else planned.model,
        "max_tokens": planned.max_tokens,
        "temperature": planned.temperature,
        "ignore_eos": True,
    }
    return generate_request(None, options)


async def measure(
    stub: inference_pb2_grpc.InferenceAsyncStub,
    message: inference_pb2.GenerateRequest,
    planned: PlannedRequest,
    *,
    started: float,
    due_s: float | None,
    timeout_s: float,
) -> Measured:
    """Ends within the request's deadline, however it ends; never raises for a failed request. `started`: perf_counter
    at the start of the run."""
    measured = Measured(planned=planned, due_s=due_s)
    sent = time.perf_counter()
    measured.sent_s = sent - started
    call = stub.Generate(message, timeout=timeout_s if planned.timeout_s is None else planned.timeout_s)
    timer = None
    if planned.cancel_after == 0:
        timer = asyncio.get_running_loop().call_later(CANCEL_BEFORE_FIRST_TOKEN_S, call.cancel)
    try:
        left = await _read(call, measured, sent)
        measured.status = grpc.StatusCode.CANCELLED if left else await call.code()
    except grpc.aio.AioRpcError as error:
        measured.status, measured.error = error.code(), error.details() or ""
    except _BrokenAnswer as error:
        measured.status, measured.error = grpc.StatusCode.DATA_LOSS, str(error)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        measured.status = grpc.StatusCode.CANCELLED  # by us, before the first token
    finally:
        measured.ended_s = time.perf_counter() - sent
        if timer is not None:
            timer.cancel()
        call.cancel()
    return measured


async def _read(call: AsyncIterable[inference_pb2.GenerateChunk], measured: Measured, sent: float) -> bool:
    """False at the answer's end, True where the request is made to leave before it."""
    arrivals, leave_after = measured.arrivals_s, measured.planned.cancel_after or None
    num_tokens, finish_reason = 0, ""
    async for chunk in call:
        now = time.perf_counter() - sent
        if chunk.index != num_tokens or finish_reason:
            raise _BrokenAnswer(f"token {chunk.index} came where token {num_tokens} was due")
        if chunk.token_ids:
            num_tokens += len(chunk.token_ids)
            measured.num_tokens = num_tokens
            arrivals.append(now)
        finish_reason = chunk.finish_reason
        if chunk.HasField("usage"):
            measured.usage = _usage(chunk.usage)
        if num_tokens == leave_after:
            return True
    if not finish_reason or not arrivals or measured.usage is None:
        raise _BrokenAnswer(f"the answer broke off after {num_tokens} tokens")
    return False


def _usage(usage: inference_pb2.Usage) -> ServerUsage:
    return ServerUsage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        kv_bytes_moved=usage.kv_bytes_moved,
        kv_bytes_bf16=usage.kv_bytes_bf16,
        ttft_s=usage.ttft_seconds,
        prefill_compute_s=usage.prefill_compute_seconds,
        store_fetch_s=usage.store_fetch_seconds,
        transfer_s=usage.transfer_seconds,
    )
