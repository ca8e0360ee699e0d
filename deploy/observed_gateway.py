"""The Inference service with an eye on it: each request to `Generate` moves the metrics and leaves one log line.

client ──▶ ObservedGateway ──▶ Gateway ──▶ workers
                └── RequestRecord ──▶ metrics, log
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from kvferry.deploy import errors
from kvferry.deploy.gateway import Gateway
from kvferry.deploy.gateway_metrics import GatewayMetrics
from kvferry.deploy.interceptor import seconds_left
from kvferry.deploy.principal import current_principal
from kvferry.deploy.request_record import RequestRecord, open_record
from kvferry.proto import inference_pb2, inference_pb2_grpc

_logger = logging.getLogger(__name__)

CANCELLED, FAILED = "Cancelled", "InternalError"
DEADLINE = errors.DeadlineExceeded.__name__


class ObservedGateway(inference_pb2_grpc.InferenceServicer):
    """Passes everything on; changes nothing."""

    def __init__(self, gateway: Gateway, metrics: GatewayMetrics, *, default_timeout_s: float) -> None:
        self._gateway = gateway
        self._metrics = metrics
        self._default_timeout_s = default_timeout_s

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        record = open_record()
        deadline = record.received + seconds_left(context, self._default_timeout_s)
        outcome = FAILED
        try:
            async with aclosing(self._gateway.Generate(request, context)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    self._count(record, chunk)
                    yield chunk
            outcome = ""
        except errors.RequestError as error:
            outcome = type(error).__name__
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = DEADLINE if time.monotonic() >= deadline else CANCELLED
            raise
        finally:
            self._ended(record, outcome)

    async def Warm(self, request: inference_pb2.WarmRequest, context: Any) -> inference_pb2.WarmReply:
        return await self._gateway.Warm(request, context)

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: Any
    ) -> inference_pb2.CountTokensReply:
        return await self._gateway.CountTokens(request, context)

    async def ListModels(self, request: inference_pb2.ListModelsRequest, context: Any) -> inference_pb2.ListModelsReply:
        return await self._gateway.ListModels(request, context)

    def _count(self, record: RequestRecord, chunk: inference_pb2.GenerateChunk) -> None:
        """At once, not at the end: a scrape during a long answer sees its tokens."""
        first = record.first_token_at is None
        for gap in record.chunk(chunk):
            self._metrics.itl.observe(gap)
        self._metrics.generation_tokens.inc(len(chunk.token_ids))
        if first and record.first_token_at is not None:
            self._metrics.ttft.observe(record.first_token_at - record.received)

    def _ended(self, record: RequestRecord, outcome: str) -> None:
        """`outcome`: empty for a request that got its last token. A client may leave without reading the status: what
        is complete is a success."""
        metrics = self._metrics
        metrics.failovers.inc(record.num_failovers)
        usage, from_workers = record.usage, record.worker_usage
        if usage is None:
            metrics.failed(outcome or FAILED)
        else:
            metrics.succeeded(record.finish_reason)
            metrics.prompt_tokens.inc(usage.prompt_tokens)
            metrics.cached_tokens.inc(usage.cached_tokens)
            metrics.e2e.observe(usage.e2e_seconds)
            metrics.queue.observe(record.queue_seconds)
            if usage.completion_tokens > 1:
                after_first = usage.e2e_seconds - usage.ttft_seconds
                metrics.tpot.observe(after_first / (usage.completion_tokens - 1))
            if from_workers is not None:
                metrics.prefill.observe(from_workers.prefill.fetch_seconds + from_workers.prefill.compute_seconds)
                metrics.decode.observe(from_workers.decode_seconds)
        _logger.info(
            "request %s", "finished" if usage is not None else "failed", extra={"fields": _fields(record, outcome)}
        )


def _fields(record: RequestRecord, outcome: str) -> dict[str, object]:
    """What the log line says: numbers, names and addresses."""
    usage = record.usage
    fields: dict[str, object] = {"decode_worker": record.decode_worker, "prefill_worker": record.prefill_worker}
    fields["failovers"] = record.num_failovers
    if client := current_principal().name:
        fields["client"] = client
    fields["queue_s"] = record.queue_seconds
    if usage is None:
        fields["error"] = outcome or FAILED
        fields["tokens"] = record.num_tokens
        fields["e2e_s"] = time.monotonic() - record.received
    else:
        fields["finish_reason"] = record.finish_reason
        fields["prompt_tokens"] = usage.prompt_tokens
        fields["completion_tokens"] = usage.completion_tokens
        fields["cached_tokens"] = usage.cached_tokens
        fields["ttft_s"] = usage.ttft_seconds
        fields["fetch_s"] = usage.store_fetch_seconds
        fields["prefill_s"] = usage.prefill_compute_seconds
        fields["transfer_s"] = usage.transfer_seconds
        fields["e2e_s"] = usage.e2e_seconds
        fields["kv_bytes_moved"] = usage.kv_bytes_moved
        if record.worker_usage is not None:
            fields["decode_s"] = record.worker_usage.decode_seconds
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}
