"""The one place where an internal server looks at who calls: deny by default, every method but `Health.Check`."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from kvferry.proto.bearer import bearer_token, is_one_of, token_digest

_logger = logging.getLogger(__name__)

OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check"})
"""What a caller without a credential may ask. The gRPC probes of Kubernetes and load balancers cannot send one; they
learn SERVING or NOT_SERVING and nothing else. `Health.Watch` holds a stream open, so it is not among them."""

_LOG_INTERVAL_S = 10.0


class Refusals:
    """Counts refused calls, and says in the log that there are some, at most every 10 s."""

    def __init__(self) -> None:
        self.num_refused = 0
        self._last_line = -_LOG_INTERVAL_S
        self._not_told = 0

    def handler(self, reason: str) -> Any:
        """A handler that ends a call of any kind with UNAUTHENTICATED, and reads nothing of it. `reason` goes to the
        caller and into the log: it holds no credential."""

        async def refuse(_: Any, context: Any) -> None:
            self._tell(context.peer(), reason)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _tell(self, peer: str, reason: str) -> None:
        self.num_refused += 1
        self._not_told += 1
        now = time.monotonic()
        if now - self._last_line >= _LOG_INTERVAL_S:
            _logger.warning("%d calls were refused, the last one from %s: %s", self._not_told, peer, reason)
            self._last_line, self._not_told = now, 0


class TokenGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Lets calls with one of these tokens through. Any other call, also to a method that does not exist, ends with
    UNAUTHENTICATED."""

    def __init__(self, tokens: Sequence[str]) -> None:
        """Raises ValueError without a token: that would let nobody in."""
        if not tokens:
            raise ValueError("a guard needs a token")
        self._digests = tuple(token_digest(token) for token in tokens)
        self.refusals = Refusals()

    def admits(self, metadata: Any) -> bool:
        """Whether a call with this metadata has one of the tokens."""
        token = bearer_token(metadata)
        return token is not None and is_one_of(token, self._digests)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        metadata = handler_call_details.invocation_metadata
        if handler_call_details.method in OPEN_METHODS or self.admits(metadata):
            return await continuation(handler_call_details)
        said = "a wrong one came" if bearer_token(metadata) else "none came"
        return self.refusals.handler(
            f"This port is for the deployment's own processes, which send the cluster token; {said}. "
            "Set security.cluster_token_file to the same file everywhere."
        )
