"""The Inference service: checks, tokenizes, picks workers, streams the answer.

client ──Generate──▶ gateway ──Decode.Generate──▶ decode worker ──Prefill──▶ prefill worker
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from typing import Any

from kvferry.deploy.admission import Admission
from kvferry.deploy.answer import Answer, usage_from_worker
from kvferry.deploy.answers import Answers
from kvferry.deploy.config import GatewayConfig, ModelLimits
from kvferry.deploy.decode_call import decode
from kvferry.deploy.detokenizer import Detokenizer, TokenTexts, special_token_ids
from kvferry.deploy.errors import (
    GatewayDraining,
    InvalidField,
    NoWorker,
    PromptTooLong,
    RequestIdInUse,
    SupersededRequest,
    UnknownModel,
    WorkerDraining,
    WorkerLost,
)
from kvferry.deploy.gateway_counters import GatewayCounters
from kvferry.deploy.interceptor import seconds_left
from kvferry.deploy.membership import Lease
from kvferry.deploy.principal import current_principal
from kvferry.deploy.prompt import PromptEncoder, Tokenizer
from kvferry.deploy.received import Received
from kvferry.deploy.request_record import request_record
from kvferry.deploy.routing.candidates import numerics_class
from kvferry.deploy.routing.router import Route, RoutedRequest, Router
from kvferry.deploy.sampling import SamplingRules
from kvferry.deploy.warm_prompt import warm_prompt
from kvferry.deploy.worker_pool import PooledWorker, WorkerPair, WorkerPool
from kvferry.proto import gateway_pb2, inference_pb2, inference_pb2_grpc, worker_pb2
from kvferry.proto.attempts import Attempts, Draining, Fenced, Superseded
from kvferry.proto.request_id import REQUEST_ID, bind_request_id

_logger = logging.getLogger(__name__)

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_MAX_ATTEMPTS = 3
_MAX_DRAINING = 13
ATTEMPTS_OF_A_GATEWAY = 256
"""A client's next attempt is at least so much greater, so that a gateway's own ones lie between them."""
_MAX_WARMING = 8
_MAX_WARM_QUEUED = 64


class Gateway(inference_pb2_grpc.InferenceServicer):
    """Raises `RequestError`s; `EdgeInterceptor` turns them into statuses and keeps the deadlines."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        tokenizer: Tokenizer,
        model: ModelLimits,
        pool: WorkerPool,
        router: Router,
    ) -> None:
        limits = config.limits
        self._config = config
        self._model = model
        self._pool = pool
        self._router = router
        self._tokenizer = tokenizer
        self._token_texts = TokenTexts(tokenizer)
        self._special_ids = special_token_ids(tokenizer)
        self._prompts = PromptEncoder(tokenizer, vocab_size=model.vocab_size, max_prompt_bytes=limits.max_prompt_bytes)
        self._sampling = SamplingRules(
            max_new_tokens=limits.max_new_tokens,
            vocab_size=model.vocab_size,
            eos_token_ids=config.eos_token_ids,
        )
        self._answering, self._counting = (
            Admission(max_concurrent=limits.max_concurrent, max_queued=limits.max_queued) for _ in range(2)
        )
        self._warming = Admission(max_concurrent=_MAX_WARMING, max_queued=_MAX_WARM_QUEUED)
        self._running = Attempts()
        self.counters = GatewayCounters()
        self._lease: Lease | None = None

    @property
    def num_running(self) -> int:
        """Requests to `Generate` that have a turn."""
        return self._answering.num_running

    @property
    def num_queued(self) -> int:
        """Requests to `Generate` that wait for one."""
        return self._answering.num_queued

    def close(self) -> None:
        self._prompts.close()

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        began = time.monotonic()
        tenant = current_principal().tenant
        deadline = began + seconds_left(context, self._config.limits.default_timeout_s)
        self._check_model(request.model)
        params = self._sampling.read(request.sampling)
        self._prompts.check(request)
        received = _received(request, params.n)
        self.counters.num_requests += 1
        self.counters.num_resumed += bool(received)
        with self._unique_request_id(request, tenant) as (request_id, attempt):
            self._check_serving()
            async with self._answering.slot():
                request_record().admitted()
                token_ids = await self._prompts.encode(request)
                self._sampling.fit_max_tokens(
                    params,
                    num_prompt_tokens=len(token_ids),
                    max_model_len=self._max_model_len(),
                )
                decode_request = worker_pb2.DecodeRequest(
                    request_id=request_id,
                    tenant=tenant,
                    token_ids=token_ids,
                    sampling=params,
                    priority=request.priority,
                    attempt=attempt,
                )
                answers = Answers(
                    [self._new_answer(decode_request, request.sampling.stop) for _ in range(params.n)], received
                )
                ttft = None
                async with aclosing(self._stream(decode_request, answers, deadline)) as chunks:
                    async for chunk, pair in chunks:
                        now = time.monotonic()
                        if ttft is None:
                            ttft = now - began
                            chunk.request_id, chunk.seed = request_id, params.seed
                        if answers.finished:
                            usage = _usage(decode_request, answers, pair)
                            usage.ttft_seconds, usage.e2e_seconds = ttft, now - began
                            chunk.usage.CopyFrom(usage)
                        yield chunk

    async def Warm(self, request: inference_pb2.WarmRequest, context: Any) -> inference_pb2.WarmReply:
        """Takes no turn of `Generate`, and does not count where requests are shared out: it only fills idle time."""
        deadline = time.monotonic() + seconds_left(context, self._config.limits.default_timeout_s)
        tenant = current_principal().tenant
        self._check_model(request.model)
        self._prompts.check(request)
        self._check_serving()
        async with self._warming.slot():
            token_ids = await self._prompts.encode(request)
            max_model_len = self._max_model_len()
            if len(token_ids) >= max_model_len:
                raise PromptTooLong(
                    f"The prompt has {len(token_ids):,} tokens; the model takes {max_model_len - 1:,} and an answer."
                )
            warmed = worker_pb2.DecodeRequest(tenant=tenant, token_ids=token_ids)
            route = self._pick(warmed, (), warm=True)
            worker = route.prefill or route.decode
            with route.prefilling():
                usage = await warm_prompt(
                    worker,
                    token_ids,
                    request_id=secrets.token_hex(16),
                    tenant=tenant,
                    priority=request.priority,
                    timeout_s=max(deadline - time.monotonic(), 0.001),
                )
        size = worker.info.block_size if worker.info else 0
        return inference_pb2.WarmReply(
            prompt_tokens=len(token_ids),
            block_tokens=len(token_ids) // size * size if size else 0,
            cached_tokens=usage.num_cached_tokens,
            stored_tokens=usage.store_tokens_written,
        )

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: Any
    ) -> inference_pb2.CountTokensReply:
        """Needs no worker; counts prompts that are too long for the model, too."""
        self._check_model(request.model)
        self._prompts.check(request)
        async with self._counting.slot():
            token_ids = await self._prompts.encode(request)
        return inference_pb2.CountTokensReply(tokens=len(token_ids), max_model_len=self._max_model_len())

    async def ListModels(self, request: inference_pb2.ListModelsRequest, context: Any) -> inference_pb2.ListModelsReply:
        """The served model, or nothing while no workers can serve it."""
        candidates = self._pool.candidates()
        info = candidates.groups[0].decodes[0].info if candidates else None
        if info is None:
            return inference_pb2.ListModelsReply()
        model = inference_pb2.Model(
            id=self._config.model_name,
            max_model_len=self._max_model_len(),
            effective_bits=info.effective_bits,
            kernels=info.kernels,
        )
        return inference_pb2.ListModelsReply(models=[model])

    async def _stream(
        self, request: worker_pb2.DecodeRequest, answers: Answers, deadline: float
    ) -> AsyncGenerator[tuple[inference_pb2.GenerateChunk, WorkerPair], None]:
        """The answers from one pair of workers; from others where the first ones are lost, without what was sent."""
        failed: list[PooledWorker] = []
        classes: tuple[bytes, bytes] | None = None  # of the first pair: another one has to say again what it has sent
        num_lost = 0
        try:
            for _ in range(_MAX_ATTEMPTS + _MAX_DRAINING):
                route = self._pick(request, failed, classes=classes)
                pair = WorkerPair(route.decode, route.prefill)
                request.prefill_address = pair.prefill.address if pair.prefill else ""
                request.ClearField("prefill_identity")
                if pair.prefill and pair.prefill.info:
                    request.prefill_identity.CopyFrom(pair.prefill.info.identity)
                classes = classes or (numerics_class(pair.decode), numerics_class(pair.prefill or pair.decode))
                request_record().assigned(pair.decode.address, pair.prefill_address)
                with ExitStack() as decoding, ExitStack() as prefilling:
                    decoding.enter_context(pair.decode.in_use())
                    if pair.prefill:
                        prefilling.enter_context(pair.prefill.in_use())
                    prefilling.enter_context(route.prefilling())
                    try:
                        chunks = decode(pair, request, answers, deadline)
                        async with aclosing(chunks):
                            async for chunk in chunks:
                                prefilling.close()
                                yield chunk, pair
                        return
                    except WorkerLost as error:
                        num_lost += not isinstance(error, WorkerDraining)
                        self._after_loss(error, pair, failed, is_last=num_lost >= _MAX_ATTEMPTS)
                        _logger.warning("a request goes to other workers: %s", error)
                request.attempt += 1
            raise NoWorker("Every worker that was asked is about to end.")
        finally:
            self.counters.num_stale_chunks += answers.num_stale

    def _after_loss(self, error: WorkerLost, pair: WorkerPair, failed: list[PooledWorker], *, is_last: bool) -> None:
        """Notes what happened to `pair`. Raises when the request cannot go on elsewhere."""
        for worker in pair.workers:
            worker.poll_now.set()
        failed += pair.workers
        if is_last:
            raise error
        if not self._pool.candidates().without(failed):
            raise WorkerLost(f"{error} No other worker is ready.") from None
        self.counters.num_failovers += 1
        self.counters.num_draining_workers += isinstance(error, WorkerDraining)

    def _pick(
        self,
        request: worker_pb2.DecodeRequest,
        failed: Collection[PooledWorker],
        *,
        classes: tuple[bytes, bytes] | None = None,
        warm: bool = False,
    ) -> Route[PooledWorker]:
        """`classes`: preferred numerics classes of decode and prefill."""
        self._check_serving()
        needed = len(request.token_ids) + request.sampling.max_tokens
        candidates = self._pool.candidates().without(failed).with_room(needed)
        if not candidates:
            raise NoWorker(f"No worker that is ready now has room for {needed:,} tokens.")
        if classes is not None:
            candidates = candidates.of_classes(*classes)
        routed = RoutedRequest(
            tenant=request.tenant, token_ids=request.token_ids, max_tokens=request.sampling.max_tokens, warm=warm
        )
        return self._router.pick(candidates, routed)

    def _new_answer(self, request: worker_pb2.DecodeRequest, stop: Iterable[str]) -> Answer:
        return Answer(
            params=request.sampling,
            stop=tuple(stop),
            vocab_size=self._model.vocab_size,
            detokenizer=Detokenizer(self._tokenizer, request.token_ids[-16:], special_ids=self._special_ids),
            token_texts=self._token_texts,
        )

    def _max_model_len(self) -> int:
        own = self._model.max_model_len
        return min(own, self._pool.candidates().max_model_len or own)

    def _check_serving(self) -> None:
        if problem := self._pool.why_not_serving():
            raise NoWorker(problem)

    def _check_model(self, model: str) -> None:
        if model not in ("", self._config.model_name):
            raise UnknownModel(f"This gateway serves {self._config.model_name!r} only.")

    @contextmanager
    def _unique_request_id(self, request: inference_pb2.GenerateRequest, tenant: str) -> Iterator[tuple[str, int]]:
        """(request_id, the first attempt's number) while the request runs. A client that tries again ends its older
        attempt here; another tenant's request with the same id is another request."""
        request_id = request.request_id or secrets.token_hex(16)
        if not REQUEST_ID.fullmatch(request_id):
            raise InvalidField(
                f"request_id is {len(request_id)} characters long; "
                "allowed: 1 to 128 letters, digits, '.', '_', ':' or '-'."
            )
        if not request.attempt and self._running.runs(tenant, request_id):
            raise RequestIdInUse("A request with this request_id is running.")
        bind_request_id(request_id)
        # A gateway's own attempts count up from the client's, or from the time: so they grow from request to request.
        attempt = request.attempt or time.time_ns() // 1_000_000 * ATTEMPTS_OF_A_GATEWAY
        try:
            with self._running.running(tenant, request_id, attempt):
                yield request_id, attempt
        except Draining as error:
            raise GatewayDraining("This gateway is about to end; ask another one.") from error
        except Superseded as error:
            raise SupersededRequest(f"Request ended: {error}.") from error
        except Fenced as error:
            raise GatewayDraining(f"This gateway ends now: {error}.") from error

    def use_lease(self, lease: Lease) -> None:
        """Whose epoch `stats` tells."""
        self._lease = lease

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new requests; waits until the running ones have ended. False when `timeout_s` was not enough: what
        still runs then is ended with UNAVAILABLE, and its clients go on elsewhere."""
        self._running.draining = True
        idle = await self._running.until_idle(timeout_s)
        self._running.end_all("its time to drain is over")
        return idle

    def stats(self) -> gateway_pb2.GatewayStats:
        calls, lease = self._running.counters, self._lease
        return gateway_pb2.GatewayStats(
            num_running=self._running.num_running,
            num_calls_given_up=self._pool.num_calls_given_up,
            num_superseded=calls.num_superseded,
            num_refused=calls.num_refused,
            num_cut=calls.num_fenced,
            epoch=lease.epoch if lease else 0,
            num_leases_lost=lease.num_leases_lost if lease else 0,
            workers=sorted({worker.address for pair in self._pool.pairs() for worker in pair.workers}),
            **vars(self.counters),
        )


def _received(request: inference_pb2.GenerateRequest, n: int) -> list[Received]:
    """What the client has, by choice; empty for a request that begins. Raises `InvalidField`."""
    if not request.received:
        return []
    if len(request.received) > n:
        raise InvalidField(f"received has {len(request.received)} entries; allowed: one for each of the {n} answers.")
    if not request.request_id or not request.attempt or not request.sampling.HasField("seed"):
        raise InvalidField("A request with received needs the request_id, an attempt and the seed that it began with.")
    return [Received(item.num_tokens, item.digest) for item in request.received]


def _usage(request: worker_pb2.DecodeRequest, answers: Answers, pair: WorkerPair) -> inference_pb2.Usage:
    request_record().accounted(answers.worker_usage)
    info = pair.decode.last_info or worker_pb2.WorkerInfo()
    usage = usage_from_worker(answers.worker_usage, kv_bytes_per_token_bf16=info.kv_bytes_per_token_bf16)
    usage.prompt_tokens = len(request.token_ids)
    usage.completion_tokens = answers.num_tokens
    usage.seed = request.sampling.seed
    return usage
