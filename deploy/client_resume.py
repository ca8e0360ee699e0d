"""How a client's request goes on when its gateway is lost: at the next one, from the token where it broke off.

The request goes out again with its id and seed, and with a count and a digest of what came. Gateways are equal; a token
depends on prompt, parameters and seed alone, so whoever computes the answer again gives the same one, and checks it.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from kvferry.deploy.client_errors import ClientError, client_error, connection_broke
from kvferry.deploy.client_messages import Chunk, ChunkReader
from kvferry.deploy.received import TokenDigest
from kvferry.proto import inference_pb2

ATTEMPT_STEP = 256
"""Between the numbers of two attempts: a gateway numbers its own tries in between."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long a client tries to go on. Raises ValueError on impossible values."""

    max_attempts: int = 32
    """Of one request, the first included; 1: no second."""
    patience_s: float = 20.0
    """Without a gateway that takes the request, since the connection to the last one broke or since the start: then the
    error is raised. A request's timeout ends it earlier."""
    longest_pause_s: float = 1.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or self.patience_s < 0 or self.longest_pause_s <= 0:
            raise ValueError("max_attempts and longest_pause_s must be positive, patience_s not negative")


def split_addresses(address: str | Sequence[str]) -> tuple[str, ...]:
    """host:port of each gateway, from a list or from one text with commas. Raises ValueError when there is none."""
    parts = address.split(",") if isinstance(address, str) else address
    addresses = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not addresses:
        raise ValueError("give the address of a gateway, host:port, or several with commas between them")
    return addresses


class Gateways:
    """The addresses, and the one to begin with: a random one, then the one that answered last."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = tuple(addresses)
        self.current = random.randrange(len(self.addresses))
        self.closed = False
        """The client is: what breaks now is not tried again."""

    def order(self) -> list[int]:
        """All of them, the current one in front."""
        first = self.current
        return [(first + i) % len(self.addresses) for i in range(len(self.addresses))]

    def after(self, error: grpc.RpcError, index: int) -> ClientError:
        """Notes that a call to gateway `index` found nobody. Raises when it found somebody who refuses it."""
        failure = client_error(error, ", ".join(self.addresses))
        if error.code() is not grpc.StatusCode.UNAVAILABLE or self.closed:
            raise failure from None
        self.current = (index + 1) % len(self.addresses)
        return failure


class Resumption:
    """One request on its way over the gateways. The same for both clients: they only move messages."""

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        gateways: Gateways,
        *,
        timeout: float | None,
        policy: RetryPolicy,
    ) -> None:
        self._request = request
        request.request_id = request.request_id or secrets.token_hex(16)
        self._gateways = gateways
        self._policy = policy
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._reader = ChunkReader(request.sampling.n)
        self._digests = [TokenDigest() for _ in range(max(request.sampling.n, 1))]
        self._index = gateways.current
        self._num_attempts = 0
        self._num_failed = 0
        """Since a gateway last had the request."""
        self._alone_since = time.monotonic()
        self._was_accepted = False
        self.is_complete = False
        """The last chunk of all has come."""

    @property
    def index(self) -> int:
        """Which gateway the next attempt goes to."""
        return self._index

    def seconds_left(self) -> float | None:
        """For the next attempt; None without a deadline."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.001)

    def message(self) -> inference_pb2.GenerateRequest:
        """The next attempt's request."""
        request = self._request
        self._num_attempts += 1
        request.attempt = max(time.time_ns() // 1_000_000 * ATTEMPT_STEP, request.attempt + ATTEMPT_STEP)
        del request.received[:]
        if self._has_tokens:
            for digest in self._digests:
                num_tokens, told = digest.received
                request.received.add(num_tokens=num_tokens, digest=told)
        return request

    def take(self, message: inference_pb2.GenerateChunk) -> Chunk:
        """The next chunk. Raises ServerError for one that cannot be it."""
        if message.request_id and not self._request.sampling.HasField("seed"):
            self._request.sampling.seed = message.seed
        chunk = self._reader.next(message)
        self._digests[chunk.choice].update(chunk.token_ids)
        self._gateways.current = self._index
        self._num_failed = 0
        self._alone_since = time.monotonic()
        self.is_complete = chunk.usage is not None
        return chunk

    def end(self) -> None:
        """Raises ServerError when the stream ended too early."""
        self._reader.end()

    def after(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the next attempt, at the next gateway. Raises the `ClientError` when there is none."""
        addresses = self._gateways.addresses
        final = client_error(error, ", ".join(addresses))
        lost = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        now = time.monotonic()
        if connection_broke(error):  # however long it was silent before: a long prompt is
            self._was_accepted, self._alone_since, self._num_failed = True, now, 0
        nobody_there = len(addresses) == 1 and not (self._was_accepted or self._has_tokens)
        if not lost or nobody_there or self._gateways.closed or self._num_attempts >= self._policy.max_attempts:
            raise final from None
        self._index = (self._index + 1) % len(addresses)
        self._num_failed += 1
        pause = self._pause()
        if now + pause > self._alone_since + self._policy.patience_s or (self._deadline or now + pause) < now + pause:
            raise final from None
        return pause

    @property
    def _has_tokens(self) -> bool:
        return any(digest.num_tokens for digest in self._digests)

    def _pause(self) -> float:
        """None before each gateway was asked once more; then longer ones."""
        rounds = self._num_failed // len(self._gateways.addresses)
        if not rounds:
            return 0.0
        return min(0.1 * float(1 << min(rounds - 1, 10)), self._policy.longest_pause_s) * random.uniform(0.7, 1.0)
