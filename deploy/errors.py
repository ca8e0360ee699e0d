"""Why a request is refused or ends early, and the gRPC status of each reason.

RequestError
├── InvalidRequest               the caller must change the request        INVALID_ARGUMENT
│   ├── InvalidField             a field is outside its documented range
│   ├── MalformedRequest         the bytes are no such message
│   ├── EmptyPrompt
│   ├── PromptTooLong            in bytes or in tokens
│   ├── UnknownRole
│   ├── TokenIdOutOfVocabulary
│   └── PromptNotUnicode         lone surrogates
├── NoChatTemplate               this model has none                       FAILED_PRECONDITION
├── UnknownModel                                                           NOT_FOUND
├── RequestIdInUse               the same id is running now                ALREADY_EXISTS
├── Overloaded                   come back later (carries retry_after_ms)  RESOURCE_EXHAUSTED
├── SlowClient                   the client stopped reading                RESOURCE_EXHAUSTED
├── NoWorker                     nothing can serve this now                UNAVAILABLE
├── WorkerLost                   the worker went away                      UNAVAILABLE
│   └── WorkerDraining           it is about to end, and takes no requests
├── GatewayDraining              this gateway is about to end              UNAVAILABLE
├── SupersededRequest            the client has tried again since          ABORTED
├── WorkerFailed                 the worker answered with an error         INTERNAL
├── BrokenStream                 tokens missing, repeated or impossible    DATA_LOSS
└── DeadlineExceeded                                                       DEADLINE_EXCEEDED

Messages are sentences for the caller. They name fields, numbers and limits, never prompt text or token ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import grpc

__all__ = [
    "BrokenStream",
    "DeadlineExceeded",
    "EmptyPrompt",
    "GatewayDraining",
    "InvalidField",
    "InvalidRequest",
    "MalformedRequest",
    "NoChatTemplate",
    "NoWorker",
    "Overloaded",
    "PromptNotUnicode",
    "PromptTooLong",
    "RequestError",
    "RequestIdInUse",
    "SlowClient",
    "SupersededRequest",
    "TokenIdOutOfVocabulary",
    "UnknownModel",
    "UnknownRole",
    "WorkerDraining",
    "WorkerFailed",
    "WorkerLost",
    "status_code",
]


class RequestError(Exception):
    """A request cannot be served; `str()` is the sentence that the client gets."""


class InvalidRequest(RequestError):
    pass


class InvalidField(InvalidRequest):
    pass


class MalformedRequest(InvalidRequest):
    pass


class EmptyPrompt(InvalidRequest):
    pass


class PromptTooLong(InvalidRequest):
    pass


class UnknownRole(InvalidRequest):
    pass


class TokenIdOutOfVocabulary(InvalidRequest):
    pass


class PromptNotUnicode(InvalidRequest):
    pass


class NoChatTemplate(RequestError):
    pass


class UnknownModel(RequestError):
    pass


class RequestIdInUse(RequestError):
    pass


class Overloaded(RequestError):
    def __init__(self, message: str, *, retry_after_ms: int) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class SlowClient(RequestError):
    pass


class NoWorker(RequestError):
    pass


class WorkerLost(RequestError):
    pass


class WorkerDraining(WorkerLost):
    pass


class GatewayDraining(RequestError):
    pass


class SupersededRequest(RequestError):
    pass


class WorkerFailed(RequestError):
    pass


class BrokenStream(RequestError):
    pass


class DeadlineExceeded(RequestError):
    pass


_STATUS: Mapping[type[RequestError], grpc.StatusCode] = MappingProxyType(
    {
        InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
        NoChatTemplate: grpc.StatusCode.FAILED_PRECONDITION,
        UnknownModel: grpc.StatusCode.NOT_FOUND,
        RequestIdInUse: grpc.StatusCode.ALREADY_EXISTS,
        Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
        SlowClient: grpc.StatusCode.RESOURCE_EXHAUSTED,
        NoWorker: grpc.StatusCode.UNAVAILABLE,
        WorkerLost: grpc.StatusCode.UNAVAILABLE,
        GatewayDraining: grpc.StatusCode.UNAVAILABLE,
        SupersededRequest: grpc.StatusCode.ABORTED,
        WorkerFailed: grpc.StatusCode.INTERNAL,
        BrokenStream: grpc.StatusCode.DATA_LOSS,
        DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)


def status_code(error: RequestError) -> grpc.StatusCode:
    """The gRPC status of `error`: its class's, or the nearest base class's."""
    for cls in type(error).__mro__:
        if cls in _STATUS:
            return _STATUS[cls]
    return grpc.StatusCode.INTERNAL
