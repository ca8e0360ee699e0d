"""The workers that the gateway knows, and what they last said they are."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import grpc

from kvferry.deploy.config import check_address
from kvferry.deploy.routing.candidates import Candidates
from kvferry.deploy.routing.worker_state import WorkerState
from kvferry.kvstore.identity import unreadable_because
from kvferry.proto import worker_pb2, worker_pb2_grpc
from kvferry.proto.grpc_options import channel_options
from kvferry.proto.peer_security import PeerSecurity

_logger = logging.getLogger(__name__)

_MAX_SILENT_POLLS = 2  # a busy worker may miss one
_LEAVING_GRACE_S = 600.0  # requests of a worker that is no longer named go on to their end


class PooledWorker(WorkerState):
    """One worker address, its channel, and what it answered to Describe and Stats."""

    def __init__(self, address: str, security: PeerSecurity) -> None:
        super().__init__(address)
        self.last_info: worker_pb2.WorkerInfo | None = None  # the last answer, whether usable or not
        self.problem = "has not answered yet"  # why there is no `info`
        self.poll_now = asyncio.Event()
        self.is_listed = True
        """It may get requests; when not, its running ones go on to their end."""
        self.channel = security.channel(address, channel_options())
        self.decode = worker_pb2_grpc.DecodeStub(self.channel)
        stub = worker_pb2_grpc.WorkerStub(self.channel)
        self._describe, self._stats = stub.Describe, stub.Stats
        self._num_silent_polls = 0
        self._missed_slowly = False
        self._ends: list[Callable[[], object]] = []

    @property
    def is_silent(self) -> bool:
        """It has missed so many polls that it cannot be counted on."""
        return self._num_silent_polls >= _MAX_SILENT_POLLS

    async def poll_load(self, *, timeout: float) -> None:
        """Refreshes `load`; without an answer the last one grows old, which `load` knows."""
        asked_at = time.monotonic()
        try:
            stats = await self._stats(worker_pb2.StatsRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            _logger.debug("worker %s does not say its load (%s)", self.address, error.code().name)
        else:
            self.load.heard(stats, asked_at=asked_at)

    @property
    def is_waited_for(self) -> bool:
        """It missed a poll, and the next one tells whether it is silent."""
        return 0 < self._num_silent_polls < _MAX_SILENT_POLLS and self._missed_slowly

    @contextmanager
    def ending(self, end: Callable[[], object]) -> Iterator[None]:
        """Runs `end` when the worker is given up in the meantime: what waits for it goes on elsewhere."""
        self._ends.append(end)
        try:
            yield
        finally:
            self._ends.remove(end)

    def give_up(self) -> int:
        """Ends what waits for this worker; how much that was."""
        ends = list(self._ends)
        for end in ends:
            end()
        return len(ends)

    async def poll(self, *, model_name: str, tokenizer_digest: bytes, timeout: float) -> None:
        """Refreshes `info`; a worker that is gone loses it at once, a slow one after some polls.

        A worker of another model, or keyed for another tokenizer than the gateway's, is not usable.
        """
        try:
            info = await self._describe(worker_pb2.DescribeRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            self._num_silent_polls += 1
            self._missed_slowly = is_slow = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            if not is_slow or self.is_silent or self.info is None:
                self.info = None
                is_refusal = error.code() == grpc.StatusCode.UNAUTHENTICATED
                answer = "does not take this gateway's token" if is_refusal else "does not answer"
                self.problem = f"{answer} ({error.code().name})"
            return
        self._num_silent_polls = 0
        self.last_info = info
        if info.model_name != model_name:
            self.info, self.problem = None, f"serves model {info.model_name!r}"
        elif not info.HasField("identity"):
            self.info, self.problem = None, "does not say what identity its model has"
        elif info.draining:
            self.info, self.problem = None, "is about to end"
        elif tokenizer_digest and info.identity.tokenizer_digest != tokenizer_digest:
            self.info, self.problem = None, "has another tokenizer than the gateway"
        else:
            self.info, self.problem = info, ""


class WorkerPair(NamedTuple):
    """Two workers that may exchange blocks. Without `prefill`, the decode worker prefills by itself."""

    decode: PooledWorker
    prefill: PooledWorker | None

    @property
    def prefill_address(self) -> str:
        return self.prefill.address if self.prefill else ""

    @property
    def workers(self) -> tuple[PooledWorker, ...]:
        return (self.decode, self.prefill) if self.prefill else (self.decode,)

    @property
    def max_model_len(self) -> int:
        return min((w.info.max_model_len for w in self.workers if w.info), default=0)


class WorkerPool:
    """Polls every worker, so that workers may start after the gateway, stop and come back.

    `on_change` runs after a poll that changed which workers are usable.
    """

    def __init__(
        self,
        *,
        model_name: str,
        tokenizer_digest: bytes = b"",
        poll_interval_s: float,
        poll_timeout_s: float,
        on_change: Callable[[], Awaitable[None]],
        security: PeerSecurity | None = None,
    ) -> None:
        self._model_name = model_name
        self._tokenizer_digest = tokenizer_digest
        self._poll_interval_s = poll_interval_s
        self._poll_timeout_s = poll_timeout_s
        self._on_change = on_change
        self._security = security or PeerSecurity()
        self._decode_addresses: tuple[str, ...] = ()
        self._prefill_addresses: tuple[str, ...] = ()
        self._workers: dict[str, PooledWorker] = {}
        self._candidates: Candidates[PooledWorker] | None = None  # None: has to be found out again
        self._polls: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self.num_calls_given_up = 0
        """Calls that were ended because their worker was silent."""

    def set_addresses(self, *, decode: Iterable[str], prefill: Iterable[str]) -> None:
        """Starts to poll new workers and forgets those that are not named. Needs a running event loop."""
        self._decode_addresses = tuple(dict.fromkeys(decode))
        self._prefill_addresses = tuple(dict.fromkeys(prefill))
        self._candidates = None
        wanted = dict.fromkeys((*self._decode_addresses, *self._prefill_addresses))
        for address in wanted:
            check_address(address)
        for address in [a for a in self._workers if a not in wanted]:
            worker, poll = self._workers.pop(address), self._polls.pop(address)
            worker.is_listed = False
            worker.poll_now.set()
            self._leaving.add(poll)
            poll.add_done_callback(self._leaving.discard)
        for address in wanted:
            if address not in self._workers:
                worker = self._workers[address] = PooledWorker(address, self._security)
                self._polls[address] = asyncio.create_task(self._poll_forever(worker))

    async def close(self) -> None:
        polls = [*self._polls.values(), *self._leaving]
        self._workers.clear()
        self._polls.clear()
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)

    def candidates(self) -> Candidates[PooledWorker]:
        """The usable workers; the same object until they change."""
        if self._candidates is None:
            self._candidates = Candidates.of(
                self._usable(self._decode_addresses, "decode"),
                self._usable(self._prefill_addresses, "prefill"),
                has_prefills=bool(self._prefill_addresses),
            )
        return self._candidates

    def pairs(self) -> list[WorkerPair]:
        """Every decode worker with every prefill worker whose blocks it can read: many."""
        return [
            WorkerPair(decode, None if prefill is decode else prefill)
            for group in self.candidates().groups
            for decode in group.decodes
            for prefill in group.prefills or (None,)
        ]

    def why_not_serving(self) -> str:
        """A sentence for operators and clients; empty when there is a usable pair."""
        if self.candidates():
            return ""
        decodes = self._usable(self._decode_addresses, "decode")
        if not decodes:
            return self._nobody("decode", self._decode_addresses)
        if not self._prefill_addresses:
            return "No prefill worker is configured and no decode worker has the role prefill."
        prefills = self._usable(self._prefill_addresses, "prefill")
        if not prefills:
            return self._nobody("prefill", self._prefill_addresses)
        prefill, decode = prefills[0], decodes[0]
        fields = unreadable_because(_identity(decode), _identity(prefill))
        return (
            f"Prefill and decode workers cannot exchange blocks: {' and '.join(fields)} of prefill worker "
            f"{prefill.address} and decode worker {decode.address} differ."
        )

    def _nobody(self, role: str, addresses: Iterable[str]) -> str:
        problems = [f"{address} {self._workers[address].problem or f'has no role {role}'}" for address in addresses]
        return f"No {role} worker is ready: {'; '.join(problems) or 'none is configured'}."

    def _usable(self, addresses: Iterable[str], role: str) -> list[PooledWorker]:
        return [worker for address in addresses if (worker := self._workers.get(address)) and worker.has_role(role)]

    async def _poll_forever(self, worker: PooledWorker) -> None:
        """Until the worker is not listed and none of its requests runs. Silence is found within
        poll_interval_s + 2 * poll_timeout_s: after a missed poll the next one begins at once."""
        leaving_since = None
        load: asyncio.Task[None] | None = None
        try:
            while worker.is_listed or worker.num_outstanding:
                if not worker.is_listed:
                    leaving_since = leaving_since or time.monotonic()
                    if time.monotonic() > leaving_since + _LEAVING_GRACE_S:
                        return
                if load is None or load.done():  # beside Describe: news of a lost worker wait for nothing
                    load = asyncio.create_task(worker.poll_load(timeout=self._poll_timeout_s))
                before = worker.info
                await worker.poll(
                    model_name=self._model_name, tokenizer_digest=self._tokenizer_digest, timeout=self._poll_timeout_s
                )
                if worker.info != before:
                    self._candidates = None
                    _log_change(worker)
                    await self._on_change()
                if worker.is_silent:
                    self._give_up(worker)
                worker.poll_now.clear()
                if worker.is_waited_for:
                    continue
                try:
                    async with asyncio.timeout(self._poll_interval_s):
                        await worker.poll_now.wait()
                except TimeoutError:
                    pass
        finally:
            if load is not None:
                load.cancel()
                await asyncio.gather(load, return_exceptions=True)
            await worker.channel.close(_LEAVING_GRACE_S)

    def _give_up(self, worker: PooledWorker) -> None:
        """Ends a silent worker's calls, if there are others: else it may be slow, and waiting is all that is left."""
        if any(worker not in pair.workers for pair in self.pairs()) and (ended := worker.give_up()):
            self.num_calls_given_up += ended
            _logger.warning("worker %s is silent: %d requests go elsewhere", worker.address, ended)


def _log_change(worker: PooledWorker) -> None:
    if worker.info is None:
        _logger.warning("worker %s %s", worker.address, worker.problem)
    else:
        _logger.info("worker %s is ready: %s", worker.address, ", ".join(worker.info.roles))


def _identity(worker: PooledWorker) -> worker_pb2.ModelIdentity:
    return worker.info.identity if worker.info else worker_pb2.ModelIdentity()
