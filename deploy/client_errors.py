"""What a client's call can end with; the tree is drawn in client.py."""

from __future__ import annotations

from typing import Any

import grpc

from kvferry.deploy.error_metadata import ACCEPTED_KEY, ERROR_KEY, RETRY_AFTER_KEY


class ClientError(Exception):
    """A call failed; `str()` is a sentence about why."""


class InvalidRequest(ClientError, ValueError):
    pass


class ModelNotFound(ClientError):
    pass


class Overloaded(ClientError):
    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(ClientError):
    pass


class Unauthenticated(ClientError):
    pass


class DeadlineExceeded(ClientError, TimeoutError):
    pass


class Cancelled(ClientError):
    pass


class ServerError(ClientError):
    pass


def client_error(error: grpc.RpcError, address: str) -> ClientError:
    """What gRPC's error means to the caller."""
    details = error.details() or "The other side gives no reason."
    pairs: Any = error.trailing_metadata() or ()
    trailing: dict[str, str] = dict(pairs)
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.FAILED_PRECONDITION | grpc.StatusCode.ALREADY_EXISTS:
            return InvalidRequest(details)
        case grpc.StatusCode.NOT_FOUND:
            return ModelNotFound(details)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if RETRY_AFTER_KEY in trailing:
            return Overloaded(details, retry_after=int(trailing[RETRY_AFTER_KEY]) / 1000)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if ERROR_KEY in trailing:
            return Cancelled(details)  # we did not read
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return InvalidRequest(f"The request is larger than the gateway reads: {details}")
        case grpc.StatusCode.UNAVAILABLE if ERROR_KEY in trailing:
            return Unavailable(details)
        case grpc.StatusCode.ABORTED if ERROR_KEY in trailing:
            return Cancelled(details)  # a newer attempt has begun
        case grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated(details)
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(f"No gateway answers at {address}, or the connection to it broke.")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded("The answer was not complete in time.")
        case grpc.StatusCode.CANCELLED:
            return Cancelled("The call was cancelled.")
        case code:
            return ServerError(f"{details} ({code.name})")


def connection_broke(error: grpc.RpcError) -> bool:
    """A gateway had the request, and the connection to it was lost: it went away, or only seemed to."""
    call: Any = error  # which it is, in both of gRPC's libraries
    initial, trailing = dict(call.initial_metadata() or ()), dict(call.trailing_metadata() or ())
    lost = call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    return lost and ACCEPTED_KEY in initial and ERROR_KEY not in trailing
