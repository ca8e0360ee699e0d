"""Calls of any method of a server by name, as somebody makes them who has nothing but a socket."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

import grpc
import grpc.aio

import kvferry.proto.bearer

LIMIT_S = 30.0
HEALTH = [f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch", "List")]
OPEN = "/grpc.health.v1.Health/Check"


def all_services() -> dict[str, list[str]]:
    """Every method of every service of our protos, as /service/Method, by service."""
    found: dict[str, list[str]] = {}
    for path in sorted(Path(kvferry.proto.bearer.__file__).parent.glob("*_pb2.py")):
        descriptor = importlib.import_module(f"kvferry.proto.{path.stem}").DESCRIPTOR
        for service in descriptor.services_by_name.values():
            found[service.full_name] = [f"/{service.full_name}/{method.name}" for method in service.methods]
    return found


async def status_of(
    channel: grpc.aio.Channel, method: str, metadata: Iterable[tuple[str, str]] = ()
) -> tuple[grpc.StatusCode, str]:
    """Of a call with an empty message; OK, too, when an answer comes. Fails when nothing comes.

    On the wire it is a call of any kind with one message. That goes out with the call's head: grpc.aio tells INTERNAL
    for a stream that ends while a message is being written.
    """
    call = channel.unary_stream(method)(b"", metadata=tuple(metadata), timeout=LIMIT_S)
    try:
        answer = await call.read()
    except grpc.aio.AioRpcError as error:
        assert error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED, f"{method} does not answer"
        return error.code(), error.details() or ""
    if answer is not grpc.aio.EOF:
        call.cancel()
        return grpc.StatusCode.OK, ""
    return await call.code(), await call.details() or ""
