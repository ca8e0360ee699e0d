"""One request on a decode worker, from reservation to last token."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvferry.decode.admission import Admission, Reservation
from kvferry.decode.block_pool import BlockPool
from kvferry.decode.config import DecodeConfig
from kvferry.decode.engine import DecodeEngine
from kvferry.decode.fetch import BlockFetcher, TransferUsage
from kvferry.decode.handoff import HandoffReceiver
from kvferry.decode.memory import KVMemory
from kvferry.decode.prefill_stream import PrefillStream
from kvferry.decode.running import SequenceGroup
from kvferry.decode.sequence import Sequence, TokenEvent
from kvferry.kernels.sampling import SampledToken, SamplingParams, TokenHistory, finish_reason
from kvferry.kvstore.key import Namespace, block_keys
from kvferry.kvstore.store import Store
from kvferry.proto import worker_pb2


@dataclass
class RequestUsage:
    """What a request cost, as far as this worker knows."""

    prefill: worker_pb2.PrefillUsage = field(default_factory=worker_pb2.PrefillUsage)
    transfer: TransferUsage = field(default_factory=TransferUsage)
    num_local_tokens: int = 0
    transfer_seconds: float = 0.0
    """From the handoff message until the last block and the tail were here."""
    decode_seconds: float = 0.0


USAGE_TIMEOUT_S = 0.2
"""How long the last token may wait for prefill to finish publishing, so that its account is whole."""


class Answer(NamedTuple):
    choice: int
    """Which of the request's `n` answers the token belongs to."""
    event: TokenEvent
    usage: RequestUsage
    """So far; complete with the last token of the last answer to finish."""


class DecodeWorker:
    """Admission, fetch and engine behind one async generator. Lives on one event loop."""

    def __init__(
        self,
        *,
        engine: DecodeEngine,
        cache: KVMemory,
        store: Store | None,
        config: DecodeConfig,
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._store = store
        self._config = config
        self._pool = BlockPool(cache.num_blocks, on_drop=cache.forget)
        self.admission = Admission(self._pool, num_slots=config.max_num_seqs, max_waiting=config.max_waiting)

    async def generate(
        self,
        *,
        token_ids: list[int],
        sampling: SamplingParams,
        namespace: Namespace,
        open_prefill: Callable[[list[int]], PrefillStream],
        remaining_s: float | None,
        priority: int = 0,
    ) -> AsyncGenerator[Answer]:
        """Yields the tokens of `sampling.n` answers, each answer's in order. Closing the generator stops the work and
        frees the room. The answers share the prompt's complete blocks.

        `open_prefill` gets the indices of the complete blocks that this worker lacks. `remaining_s`: until the
        request's deadline; None without one. `priority`: lower goes first.
        """
        n = sampling.n
        keys = block_keys(namespace, token_ids)
        # The last token's K and V are never needed, so the longest cache is one token short of prompt + answer.
        max_blocks = (len(token_ids) + sampling.max_tokens - 1) // namespace.block_size
        own_blocks = max_blocks - len(keys)
        tail_bytes = len(token_ids) % namespace.block_size * self._cache.layout.bytes_per_token_bf16
        usage = RequestUsage()
        async with self.admission.reserve(
            len(keys) + n * min(own_blocks, 1),
            keys,
            num_slots=n,
            max_blocks=len(keys) + n * own_blocks,
            priority=priority,
        ) as room:
            usage.num_local_tokens = len(room.shared) * namespace.block_size
            in_ring = {index for index in range(len(keys)) if self._cache.in_ring(index, len(keys))}
            missing = set(range(len(keys))) - room.shared | in_ring
            stream = open_prefill(sorted(missing))
            fetcher = self._fetcher(keys, namespace, room, missing, stream, remaining_s)
            usage.transfer = fetcher.usage
            receiver = HandoffReceiver(
                stream,
                fetcher,
                num_blocks=len(keys),
                num_layers=self._cache.layout.num_layers,
                tail_bytes=tail_bytes,
            )
            async with receiver as handoff:
                chunks = await handoff.first_tokens(n)
                histories = [_history(token_ids, chunk.token_id) for chunk in chunks]
                reasons = [finish_reason(c.token_id, h, sampling) for c, h in zip(chunks, histories, strict=True)]
                unfinished = reasons.count("")
                usage.prefill = handoff.account() if unfinished else await handoff.finished(USAGE_TIMEOUT_S)
                for choice, (chunk, reason) in enumerate(zip(chunks, reasons, strict=True)):
                    yield Answer(choice, _first_event(chunk, sampling, reason), usage)
                if not unfinished:
                    return
                tail_len = self._take_tail(await handoff.complete(), room, fetcher.usage)
                usage.transfer_seconds = handoff.transfer_seconds
                group = SequenceGroup(
                    engine=self._engine,
                    cache=self._cache,
                    admission=self.admission,
                    room=room,
                    max_blocks=max_blocks,
                    prefix_caching=self._config.prefix_caching,
                )
                spare = iter(room.block_ids[len(keys) :])
                sequences = [
                    Sequence(
                        num_prompt_tokens=len(token_ids),
                        sampling=sampling.for_choice(choice),
                        history=histories[choice],
                        slot=room.slots[choice],
                        block_ids=room.block_ids[: len(keys)] + [next(spare) for _ in range(min(own_blocks, 1))],
                        num_blocks=len(keys),
                        tail_len=tail_len,
                        last_token=chunk.token_id,
                        listener=group,
                        choice=choice,
                    )
                    for choice, chunk in enumerate(chunks)
                    if not reasons[choice]
                ]
                started = time.monotonic()
                async with group.run(sequences):
                    async for choice, event in group.events():
                        usage.decode_seconds = time.monotonic() - started
                        usage.prefill = handoff.account()
                        unfinished -= bool(event.finish_reason)
                        if not unfinished:
                            usage.prefill = await handoff.finished(USAGE_TIMEOUT_S)
                        yield Answer(choice, event, usage)

    def _take_tail(self, tail: bytes, room: Reservation, usage: TransferUsage) -> int:
        first, *others = room.slots
        tokens = self._cache.load_tail(first, tail)
        if room.keys:
            self._cache.use_sinks(first, room.block_ids[0])
        for slot in others:
            self._cache.copy_slot(first, slot, tail_len=tokens)
        usage.handoff_bytes += len(tail)
        usage.handoff_tokens += tokens
        return tokens

    def _fetcher(
        self,
        keys: list[bytes],
        namespace: Namespace,
        room: Reservation,
        missing: set[int],
        stream: PrefillStream,
        remaining_s: float | None,
    ) -> BlockFetcher:
        def loaded(index: int) -> None:
            if self._config.prefix_caching:
                self._pool.publish(room.block_ids[index], keys[index])

        return BlockFetcher(
            keys=keys,
            namespace=namespace.digest(),
            block_ids=room.block_ids,
            missing=missing,
            present=room.shared,
            slot=room.slots[0],
            cache=self._cache,
            store=self._store,
            ask_prefill=stream.ask,
            loaded=loaded,
            timeout_s=min(self._config.fetch_timeout_s, (remaining_s or float("inf")) / 4),
        )


def _history(token_ids: list[int], first: int) -> TokenHistory:
    history = TokenHistory.of(token_ids)
    history.append(first)
    return history


def _first_event(chunk: worker_pb2.TokenChunk, sampling: SamplingParams, reason: str) -> TokenEvent:
    logprob = chunk.logprob if sampling.top_logprobs is not None else None
    top = [(t.token_id, t.logprob) for t in chunk.top_logprobs]
    return TokenEvent(0, SampledToken(chunk.token_id, logprob, top), reason)
