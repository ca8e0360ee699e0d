"""The one place where the store's exceptions become gRPC status codes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from kvferry.kvstore.errors import (
    BlockCorrupt,
    BlockNotFound,
    InvalidRequest,
    KVStoreError,
    StoreFull,
    StoreUnavailable,
)
from kvferry.kvstore.frames import parse_put_frame, serialize_get_frame
from kvferry.proto.request_id import bind_from_metadata

_log = logging.getLogger(__name__)

SERVICE_NAME = "kvferry.kvstore.v1.KVStore"

STATUS_CODES: dict[type[KVStoreError], grpc.StatusCode] = {
    BlockNotFound: grpc.StatusCode.NOT_FOUND,
    BlockCorrupt: grpc.StatusCode.DATA_LOSS,
    StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
    StoreFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
}


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps KVStoreError to its status; anything else is logged here and told as INTERNAL.

    Also gives Get and Put their own codecs (see frames.py), and ends a server stream whose client takes no
    message for `stalled_reader_s`.
    """

    def __init__(self, *, stalled_reader_s: float) -> None:
        self._stalled_reader_s = stalled_reader_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handlers of the KVStore service; others (health) pass untouched."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(f"/{SERVICE_NAME}/"):
            return handler
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        method = handler_call_details.method.rpartition("/")[2]
        if method == "Get":
            codecs["response_serializer"] = serialize_get_frame
        elif method == "Put":
            codecs["request_deserializer"] = parse_put_frame
        if handler.request_streaming:
            behavior = self._wrap_unary_response(handler.stream_unary, method)
            return grpc.stream_unary_rpc_method_handler(behavior, **codecs)
        if handler.response_streaming:
            behavior = self._wrap_stream_response(handler.unary_stream, method)
            return grpc.unary_stream_rpc_method_handler(behavior, **codecs)
        behavior = self._wrap_unary_response(handler.unary_unary, method)
        return grpc.unary_unary_rpc_method_handler(behavior, **codecs)

    def _wrap_unary_response(self, inner: Any, method: str) -> Any:
        async def behavior(request: Any, context: Any) -> Any:
            bind_from_metadata(context.invocation_metadata())
            _log.debug("%s", method)
            try:
                return await inner(request, context)
            except Exception as error:
                await _abort(context, error)

        return behavior

    def _wrap_stream_response(self, inner: Any, method: str) -> Any:
        async def behavior(request: Any, context: Any) -> None:
            bind_from_metadata(context.invocation_metadata())
            _log.debug("%s", method)
            messages = inner(request, context)
            try:
                async for message in messages:
                    async with asyncio.timeout(self._stalled_reader_s):
                        await context.write(message)
            except Exception as error:
                await _abort(context, error)
            finally:
                await messages.aclose()

        return behavior


async def _abort(context: Any, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, KVStoreError):
        code = next(STATUS_CODES[kind] for kind in type(error).__mro__ if kind in STATUS_CODES)
        await context.abort(code, str(error))
    if isinstance(error, TimeoutError):
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the client took no frame for too long; ask again")
    _log.error("a store call failed unexpectedly", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "the node failed unexpectedly; its log has the traceback")
