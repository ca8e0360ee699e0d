"""The edge of the gateway: bytes to messages, deadlines, slow clients, and exceptions to gRPC status.

Handlers hold no try/except for any of these.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message

from kvferry.deploy.error_metadata import ACCEPTED_KEY, ERROR_KEY, RETRY_AFTER_KEY
from kvferry.deploy.errors import (
    DeadlineExceeded,
    MalformedRequest,
    Overloaded,
    RequestError,
    SlowClient,
    status_code,
)

_logger = logging.getLogger(__name__)

_NO_DEADLINE_S = 10 * 365 * 24 * 3600.0  # gRPC tells a very long time when the client set none


class EdgeInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Wraps the methods of one service; others pass untouched.

    A request without a deadline gets `default_timeout_s`. A client that does not read for `write_timeout_s` is dropped.
    """

    def __init__(self, service: str, *, default_timeout_s: float, write_timeout_s: float) -> None:
        self._prefix = f"/{service}/"
        self._default_timeout_s = default_timeout_s
        self._write_timeout_s = write_timeout_s

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        parse = handler.request_deserializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream, parse),
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary, parse),
            response_serializer=handler.response_serializer,
        )

    def _unary(self, behaviour: Callable[[Any, Any], Awaitable[Message]], parse: Any) -> Any:
        async def handle(data: bytes, context: Any) -> Message:
            try:
                async with asyncio.timeout(self._seconds_left(context)):
                    return await behaviour(_parse(parse, data), context)
            except Exception as error:
                await self._abort(context, error)

        return handle

    def _stream(self, behaviour: Callable[[Any, Any], AsyncIterator[Message]], parse: Any) -> Any:
        async def handle(data: bytes, context: Any) -> None:
            try:
                await context.send_initial_metadata(((ACCEPTED_KEY, "1"),))
                async with (
                    asyncio.timeout(self._seconds_left(context)),
                    aclosing(behaviour(_parse(parse, data), context)) as messages,  # type: ignore[type-var]
                ):
                    async for message in messages:
                        await self._write(context, message)
            except Exception as error:
                await self._abort(context, error)

        return handle

    def _seconds_left(self, context: Any) -> float:
        return seconds_left(context, self._default_timeout_s)

    async def _write(self, context: Any, message: Message) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s) as limit:
                await context.write(message)
        except TimeoutError:
            if not limit.expired():
                raise
            raise SlowClient(f"The client read nothing for {self._write_timeout_s:g} s.") from None

    async def _abort(self, context: Any, error: Exception) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, TimeoutError):
            error = DeadlineExceeded("The request's time is over.")
        if isinstance(error, RequestError):
            trailing = [(ERROR_KEY, type(error).__name__)]
            if isinstance(error, Overloaded):
                trailing.append((RETRY_AFTER_KEY, str(error.retry_after_ms)))
            await context.abort(status_code(error), str(error), trailing_metadata=tuple(trailing))
        # The message of an unforeseen error may quote a prompt, so only its place is logged.
        place = "".join(traceback.format_tb(error.__traceback__))
        _logger.error("unforeseen %s at\n%s", type(error).__name__, place)
        await context.abort(grpc.StatusCode.INTERNAL, "The gateway failed; its log tells where.")
        raise AssertionError("abort returned")


def seconds_left(context: Any, default: float) -> float:
    """Until the client's deadline, or `default` when it set none."""
    left: float | None = context.time_remaining()
    return default if left is None or left > _NO_DEADLINE_S else left


def _parse(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return parse(data)
    except (DecodeError, UnicodeDecodeError, RecursionError):
        raise MalformedRequest("The request is no valid message of this method.") from None
