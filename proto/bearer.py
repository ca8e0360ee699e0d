"""A secret in the metadata of every call: `authorization: Bearer …`.

gRPC's own call credentials need an encrypted channel, and the processes of a cluster may speak plain text in a network
of their own; so a channel adds the metadata itself. Client interceptors would do, too, but grpc.aio wraps every stream
then, for each message.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

AUTHORIZATION = "authorization"
_SCHEME = "bearer "


def bearer_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """What a call with this token carries."""
    return ((AUTHORIZATION, f"Bearer {token}"),)


def bearer_token(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The token of a call; None without one, and for what is none: another scheme, or several."""
    values = [value for key, value in metadata or () if key == AUTHORIZATION]
    if len(values) != 1 or not isinstance(values[0], str) or not values[0].lower().startswith(_SCHEME):
        return None
    return values[0][len(_SCHEME) :].strip() or None


def token_digest(token: str) -> bytes:
    """SHA-256. Tokens are random and long, so a plain hash keeps them: there is nothing to guess."""
    return hashlib.sha256(token.encode()).digest()


def is_one_of(token: str, digests: Iterable[bytes]) -> bool:
    """Whether it is the token of one of these digests. Takes the same time for every token."""
    digest, found = token_digest(token), False
    for known in digests:
        found |= hmac.compare_digest(digest, known)
    return found


class _Calls:
    """A method of a channel, whose calls carry more metadata."""

    def __init__(self, method: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._method = method
        self._metadata = metadata

    def __call__(self, *args: Any, metadata: Iterable[tuple[str, str]] | None = None, **options: Any) -> Any:
        return self._method(*args, metadata=(*(metadata or ()), *self._metadata), **options)


class _AddsToken:
    """The four kinds of methods."""

    def __init__(self, channel: Any, token: str) -> None:
        self._channel = channel
        self._metadata = bearer_metadata(token)

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return _Calls(self._channel.unary_unary(*args, **options), self._metadata)

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return _Calls(self._channel.unary_stream(*args, **options), self._metadata)

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return _Calls(self._channel.stream_unary(*args, **options), self._metadata)

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return _Calls(self._channel.stream_stream(*args, **options), self._metadata)


class BearerChannel(_AddsToken, grpc.aio.Channel):
    """A channel of grpc.aio, with a token on every call. Owns the channel."""

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        state: grpc.ChannelConnectivity = self._channel.get_state(try_to_connect)
        return state

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class BlockingBearerChannel(_AddsToken, grpc.Channel):
    """The same for a channel of threads."""

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        self._channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
