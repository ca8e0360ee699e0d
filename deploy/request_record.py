"""One request as the gateway saw it: times, tokens, workers, its end. A log line and the metrics come of it."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from kvferry.proto import inference_pb2, worker_pb2


@dataclass(kw_only=True)
class RequestRecord:
    """Filled by the gateway on the request's way. Times are `time.monotonic()`, in seconds."""

    received: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    num_tokens: int = 0
    num_failovers: int = 0
    decode_worker: str = ""
    prefill_worker: str = ""
    worker_usage: worker_pb2.DecodeUsage | None = None
    usage: inference_pb2.Usage | None = None
    """Of a finished request."""
    finish_reason: str = ""
    """Of the last answer to finish."""
    _answer_times: dict[int, float] = field(default_factory=dict)

    def admitted(self) -> None:
        """The gateway gives it a turn."""
        self.admitted_at = time.monotonic()

    def assigned(self, decode: str, prefill: str) -> None:
        """These workers have it now: host:port, `prefill` empty where one worker does both."""
        self.num_failovers += bool(self.decode_worker)
        self.decode_worker, self.prefill_worker = decode, prefill

    def accounted(self, usage: worker_pb2.DecodeUsage) -> None:
        """What the workers say that it cost."""
        self.worker_usage = usage

    def chunk(self, chunk: inference_pb2.GenerateChunk) -> list[float]:
        """A piece goes to the client. Returns the gaps between its tokens and their answer's token before."""
        now = time.monotonic()
        gaps: list[float] = []
        if chunk.token_ids:
            before = self._answer_times.get(chunk.choice)
            if before is not None:
                gaps.append(now - before)
            self._answer_times[chunk.choice] = now
            self.first_token_at = now if self.first_token_at is None else self.first_token_at
            self.last_token_at = now
            self.num_tokens += len(chunk.token_ids)
        if chunk.HasField("usage"):
            self.usage, self.finish_reason = chunk.usage, chunk.finish_reason
        return gaps

    @property
    def queue_seconds(self) -> float:
        """At the gateway and on the prefill worker."""
        here = 0.0 if self.admitted_at is None else self.admitted_at - self.received
        return here + (0.0 if self.worker_usage is None else self.worker_usage.prefill.queue_seconds)


_current: ContextVar[RequestRecord | None] = ContextVar("kvferry_request_record", default=None)


def open_record() -> RequestRecord:
    """A new record, for the request that this task serves from now on."""
    record = RequestRecord()
    _current.set(record)
    return record


def request_record() -> RequestRecord:
    """Of the request that this task serves; one that nobody reads where none was opened."""
    return _current.get() or RequestRecord()
