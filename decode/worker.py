"""One request on a decode worker, from reservation to last token."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvferry.decode.admission import Admission, Reservation
from kvferry.decode.block_pool import BlockPool
from kvferry.decode.cache import PackedCache
from kvferry.decode.config import DecodeConfig
from kvferry.decode.engine import DecodeEngine
from kvferry.decode.fetch import BlockFetcher, TransferUsage
from kvferry.decode.handoff import HandoffReceiver
from kvferry.decode.prefill_stream import PrefillStream
from kvferry.decode.running import RunningSequence
from kvferry.decode.sequence import Sequence, TokenEvent
from kvferry.kernels.sampling import SampledToken, SamplingParams, TokenHistory, finish_reason
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.key import Namespace, block_keys
from kvferry.proto import worker_pb2


@dataclass
class RequestUsage:
    """What a request cost, as far as this worker knows."""

    prefill: worker_pb2.PrefillUsage = field(default_factory=worker_pb2.PrefillUsage)
    transfer: TransferUsage = field(default_factory=TransferUsage)
    num_local_tokens: int = 0
    transfer_seconds: float = 0.0
    decode_seconds: float = 0.0


USAGE_TIMEOUT_S = 0.2
"""How long the last token may wait for prefill to finish publishing, so that its account is whole."""


class Answer(NamedTuple):
    event: TokenEvent
    usage: RequestUsage
    """So far; complete with the last token."""


class DecodeWorker:
    """Admission, fetch and engine behind one async generator. Lives on one event loop."""

    def __init__(
        self,
        *,
        engine: DecodeEngine,
        cache: PackedCache,
        store: StoreClient | None,
        config: DecodeConfig,
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._store = store
        self._config = config
        self._pool = BlockPool(cache.pool.shape[0], on_drop=cache.forget)
        self.admission = Admission(self._pool, num_slots=config.max_num_seqs, max_waiting=config.max_waiting)

    async def generate(
        self,
        *,
        token_ids: list[int],
        sampling: SamplingParams,
        namespace: Namespace,
        open_prefill: Callable[[], PrefillStream],
        remaining_s: float | None,
    ) -> AsyncGenerator[Answer]:
        """Yields the answer's tokens in order. Closing the generator stops the work and frees the room.

        `remaining_s`: until the request's deadline; None without one.
        """
        keys = block_keys(namespace, token_ids)
        # The last token's K and V are never needed, so the longest cache is one token short of prompt + answer.
        num_blocks = (len(token_ids) + sampling.max_tokens - 1) // namespace.block_size
        tail_bytes = len(token_ids) % namespace.block_size * self._cache.layout.bytes_per_token_bf16
        usage = RequestUsage()
        async with self.admission.reserve(num_blocks, keys) as reservation:
            usage.num_local_tokens = len(reservation.shared) * namespace.block_size
            stream = open_prefill()
            fetcher = self._fetcher(keys, namespace, reservation, stream, remaining_s)
            usage.transfer = fetcher.usage
            async with HandoffReceiver(stream, fetcher) as handoff:
                chunk = await handoff.first_token()
                history = TokenHistory.of(token_ids)
                history.append(chunk.token_id)
                reason = finish_reason(chunk.token_id, history, sampling)
                usage.prefill = await handoff.finished(USAGE_TIMEOUT_S) if reason else handoff.account()
                yield Answer(_first_event(chunk, sampling, reason), usage)
                if reason:
                    return
                handed_over = time.monotonic()
                tail_len = self._take_tail(await handoff.complete(tail_bytes), reservation, fetcher.usage)
                usage.transfer_seconds = time.monotonic() - handed_over
                running = RunningSequence(self._engine)
                sequence = Sequence(
                    num_prompt_tokens=len(token_ids),
                    sampling=sampling,
                    history=history,
                    slot=reservation.slot,
                    block_ids=reservation.block_ids,
                    num_blocks=len(keys),
                    tail_len=tail_len,
                    last_token=chunk.token_id,
                    on_token=running.put,
                    on_error=running.put,
                    on_released=running.release,
                )
                started = time.monotonic()
                async with running.hold(sequence):
                    async for event in running.events():
                        usage.decode_seconds = time.monotonic() - started
                        usage.prefill = handoff.account()
                        if event.finish_reason:
                            usage.prefill = await handoff.finished(USAGE_TIMEOUT_S)
                        yield Answer(event, usage)

    def _take_tail(self, tail: bytes, reservation: Reservation, usage: TransferUsage) -> int:
        tokens = self._cache.load_tail(reservation.slot, tail)
        usage.handoff_bytes += len(tail)
        usage.handoff_tokens += tokens
        return tokens

    def _fetcher(
        self,
        keys: list[bytes],
        namespace: Namespace,
        reservation: Reservation,
        stream: PrefillStream,
        remaining_s: float | None,
    ) -> BlockFetcher:
        def loaded(index: int) -> None:
            if self._config.prefix_caching:
                self._pool.publish(reservation.block_ids[index], keys[index])
            if index == 0:
                self._cache.use_sinks(reservation.slot, reservation.block_ids[0])

        if 0 in reservation.shared:
            self._cache.use_sinks(reservation.slot, reservation.block_ids[0])

        return BlockFetcher(
            keys=keys,
            namespace=namespace.digest(),
            block_ids=reservation.block_ids,
            missing=set(range(len(keys))) - reservation.shared,
            cache=self._cache,
            store=self._store,
            ask_prefill=stream.ask,
            loaded=loaded,
            timeout_s=min(self._config.fetch_timeout_s, (remaining_s or float("inf")) / 4),
        )


def _first_event(chunk: worker_pb2.TokenChunk, sampling: SamplingParams, reason: str) -> TokenEvent:
    logprob = chunk.logprob if sampling.top_logprobs is not None else None
    top = [(t.token_id, t.logprob) for t in chunk.top_logprobs]
    return TokenEvent(0, SampledToken(chunk.token_id, logprob, top), reason)
