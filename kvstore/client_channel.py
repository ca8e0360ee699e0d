"""From a node's gRPC status to the store's exceptions, and the channel that both need."""

from __future__ import annotations

from typing import TypeVar

import grpc
import grpc.aio

from kvferry.kvstore.config import MAX_MESSAGE_BYTES
from kvferry.kvstore.errors import (
    BlockCorrupt,
    BlockNotFound,
    InvalidRequest,
    KVStoreError,
    StoreUnavailable,
)
from kvferry.proto.grpc_options import Options, channel_options

T = TypeVar("T")


def whole(reply: T | None) -> T:
    """The answer of a call. grpc.aio gives None, and no error, for one whose message was damaged on its way. Raises
    StoreUnavailable."""
    if reply is None:
        raise StoreUnavailable("the node's answer came without a message")
    return reply


def translate(error: grpc.aio.AioRpcError, address: str, exhausted: type[KVStoreError]) -> KVStoreError:
    """What the client raises for this status; `exhausted` is what RESOURCE_EXHAUSTED means to the call."""
    details = error.details() or "no details"
    kinds: dict[grpc.StatusCode, type[KVStoreError]] = {
        grpc.StatusCode.NOT_FOUND: BlockNotFound,
        grpc.StatusCode.DATA_LOSS: BlockCorrupt,
        grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
        grpc.StatusCode.RESOURCE_EXHAUSTED: exhausted,
    }
    kind = kinds.get(error.code())
    if kind is not None:
        return kind(details)
    return StoreUnavailable(f"the store at {address} answered {error.code().name}: {details}")


def store_channel_options() -> Options:
    """Options of a client's channel to its node."""
    return [
        *channel_options(max_receive_bytes=MAX_MESSAGE_BYTES, ping_while_idle=True),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # One client, one connection: another client's broken one must not fail this one.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
    ]
