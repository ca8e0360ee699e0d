"""The decode worker on the wire: `DecodeWorker` behind the Decode service."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import grpc

from kvferry.decode.admission import RequestTooLarge, WorkerFull
from kvferry.decode.config import DecodeConfig
from kvferry.decode.metrics import DecodeMetrics
from kvferry.decode.prefill_peers import PrefillPeers
from kvferry.decode.prefill_stream import PrefillFailed, PrefillStream, RemotePrefillStream
from kvferry.decode.running import DecodeFailed
from kvferry.decode.warm import AnswerWarmer
from kvferry.decode.worker import Answer, DecodeWorker, RequestUsage
from kvferry.kernels.sampling import MAX_TOP_LOGPROBS, SamplingParams
from kvferry.kvstore.identity import namespace_of, unreadable_because
from kvferry.proto import worker_pb2, worker_pb2_grpc
from kvferry.proto.attempts import Attempts, CallEnded, Draining
from kvferry.proto.peer_security import PeerSecurity
from kvferry.proto.request_id import bind_request_id
from kvferry.proto.trailing_metadata import RETRY_AFTER_KEY

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[worker_pb2.DecodeRequest, worker_pb2.TokenChunk]


class DecodeServicer(worker_pb2_grpc.DecodeServicer):
    """Checks requests, runs them on the worker and translates its answers."""

    def __init__(
        self,
        *,
        worker: DecodeWorker,
        info: worker_pb2.WorkerInfo,
        vocab_size: int,
        config: DecodeConfig,
        local_prefill: Callable[[worker_pb2.PrefillStart, float], PrefillStream] | None = None,
        remote_prefill: type[RemotePrefillStream] = RemotePrefillStream,
        security: PeerSecurity | None = None,
    ) -> None:
        """`local_prefill` opens an exchange with the prefill worker in this process, for requests that name no other;
        its second argument is the time limit in seconds. `remote_prefill`: how to reach the others.
        `security`: what they ask for."""
        self._remote_prefill = remote_prefill
        self._worker = worker
        self._info = info
        self._vocab_size = vocab_size
        self._config = config
        self._local_prefill = local_prefill
        self._peers = PrefillPeers(security)
        self.warmer = AnswerWarmer()
        self.metrics = DecodeMetrics(info.model_name)
        self.attempts = Attempts()
        """The requests that run here."""

    @property
    def num_prefill_lost(self) -> int:
        """Prefill workers that were given up while a request waited for them."""
        return self._peers.num_lost

    async def close(self) -> None:
        await self.warmer.close()
        await self._peers.close()

    async def Generate(
        self, request: worker_pb2.DecodeRequest, context: Context
    ) -> AsyncIterator[worker_pb2.TokenChunk]:
        bind_request_id(request.request_id)
        try:
            with self.attempts.running(request.tenant, request.request_id, request.attempt) as running:
                await self._check(request, context)
                async with aclosing(running.pumped(self._answer(request, context))) as chunks:
                    async for chunk in chunks:
                        yield chunk
        except CallEnded as error:
            await context.abort(error.code, str(error), trailing_metadata=error.metadata)
        except grpc.aio.AbortError:
            raise
        except RequestTooLarge as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except WorkerFull as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except PrefillFailed as error:
            hint = ((RETRY_AFTER_KEY, error.retry_after_ms),) if error.retry_after_ms else ()
            draining = Draining.metadata if error.draining else ()
            await context.abort(error.code, str(error), trailing_metadata=(*hint, *draining))
        except Exception as error:  # the edge: whatever failed, the caller is told
            if not isinstance(error, DecodeFailed | ValueError):
                logger.exception("a decode request failed")
            await context.abort(grpc.StatusCode.INTERNAL, f"decode failed: {error}")

    async def _answer(
        self, request: worker_pb2.DecodeRequest, context: Context
    ) -> AsyncGenerator[worker_pb2.TokenChunk]:
        answers = self._worker.generate(
            token_ids=list(request.token_ids),
            sampling=SamplingParams.of(request.sampling),
            namespace=namespace_of(self._maker(request), tenant=request.tenant, block_size=self._info.block_size),
            open_prefill=lambda missing: self._open_prefill(request, context, missing),
            remaining_s=context.time_remaining(),
            priority=request.priority,
        )
        written: list[int] = []
        usage, finished = None, False
        try:
            async with aclosing(answers):
                async for answer in answers:
                    usage = answer.usage
                    self.metrics.tokens.inc()
                    if answer.choice == 0:
                        written.append(answer.event.token.token_id)
                    chunk = answer_to_pb(answer)
                    chunk.attempt = request.attempt
                    yield chunk
            finished = True
            self._warm(request, written)
        finally:
            logger.debug("decoding %s", "finished" if finished else "ended", extra={"fields": {"tokens": len(written)}})
            self.metrics.ended(
                usage,
                finished=finished,
                num_tokens=len(request.token_ids),
                block_size=self._info.block_size,
                bf16_bytes_per_token=self._info.kv_bytes_per_token_bf16,
            )

    async def _check(self, request: worker_pb2.DecodeRequest, context: Context) -> None:
        total = len(request.token_ids) + request.sampling.max_tokens
        problem = ""
        if not request.token_ids:
            problem = "the prompt has no tokens"
        elif request.sampling.max_tokens < 1:
            problem = "max_tokens must be at least 1"
        elif total > self._info.max_model_len:
            problem = (
                f"{len(request.token_ids)} prompt tokens and max_tokens {request.sampling.max_tokens} "
                f"are over the model's {self._info.max_model_len}"
            )
        elif max(request.token_ids) >= self._vocab_size:
            problem = f"a token id is not below {self._vocab_size}"
        elif request.sampling.top_logprobs > MAX_TOP_LOGPROBS:
            problem = f"top_logprobs must be at most {MAX_TOP_LOGPROBS}"
        elif not request.tenant:
            problem = "tenant is empty"
        elif not request.prefill_address and self._local_prefill is None:
            problem = "prefill_address is empty, and this worker has not the role prefill"
        if problem:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        if fields := unreadable_because(self._info.identity, self._maker(request)):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this decode worker cannot read the prefill worker's blocks: {' and '.join(fields)} differ; "
                "start all workers from the same configuration",
            )

    def _maker(self, request: worker_pb2.DecodeRequest) -> worker_pb2.ModelIdentity:
        """Of the worker whose blocks the request uses."""
        return request.prefill_identity if request.HasField("prefill_identity") else self._info.identity

    def _open_prefill(self, request: worker_pb2.DecodeRequest, context: Context, missing: list[int]) -> PrefillStream:
        remaining = context.time_remaining()
        return self._prefill_stream(
            request,
            worker_pb2.PrefillStart(
                request_id=request.request_id,
                tenant=request.tenant,
                token_ids=request.token_ids,
                sampling=request.sampling,
                identity=self._maker(request),
                priority=request.priority,
                attempt=request.attempt,
                pieces=worker_pb2.PieceRequest(blocks=missing),
            ),
            timeout_s=self._config.prefill_timeout_s if remaining is None else remaining,
        )

    def _warm(self, request: worker_pb2.DecodeRequest, written: list[int]) -> None:
        """Has the blocks that a single answer completed computed for the conversation's next turn."""
        size, prompt = self._info.block_size, len(request.token_ids)
        if (
            not self._config.publish_answers
            or request.sampling.n > 1
            or (prompt + len(written)) // size == prompt // size
        ):
            return
        start = worker_pb2.PrefillStart(
            request_id=request.request_id,
            tenant=request.tenant,
            token_ids=[*request.token_ids, *written],
            identity=self._maker(request),
            priority=request.priority,
            warm=True,
        )
        self.warmer.warm(self._prefill_stream(request, start, timeout_s=self._config.prefill_timeout_s))

    def _prefill_stream(
        self, request: worker_pb2.DecodeRequest, start: worker_pb2.PrefillStart, *, timeout_s: float
    ) -> PrefillStream:
        address = request.prefill_address
        if not address:
            assert self._local_prefill is not None  # `_check`
            return self._local_prefill(start, timeout_s)
        return self._remote_prefill(self._peers.get(address), start, timeout_s=timeout_s)


def answer_to_pb(answer: Answer) -> worker_pb2.TokenChunk:
    event = answer.event
    index, token, reason = event.index, event.token, event.finish_reason
    return worker_pb2.TokenChunk(
        index=index,
        token_id=token.token_id,
        logprob=token.logprob or 0.0,
        top_logprobs=[worker_pb2.TokenLogprob(token_id=i, logprob=p) for i, p in token.top_logprobs],
        finish_reason=reason,
        usage=usage_to_pb(answer.usage),
        choice=answer.choice,
    )


def usage_to_pb(usage: RequestUsage) -> worker_pb2.DecodeUsage:
    return worker_pb2.DecodeUsage(
        prefill=usage.prefill,
        num_local_tokens=usage.num_local_tokens,
        transfer_seconds=usage.transfer_seconds,
        decode_seconds=usage.decode_seconds,
        **vars(usage.transfer),
    )
