"""The Python client.

    with Client("127.0.0.1:7600") as client:
        print(client.generate(messages=[{"role": "user", "content": "Hello"}], max_tokens=64).text)
        for chunk in client.stream(prompt="Once upon a time"):
            print(chunk.text, end="")

With several addresses ("a:7600,b:7600", or a list) the client begins at any of them and goes on at the next one when a
connection is lost, also in the middle of an answer: no token is missing, repeated or changed.

ClientError
├── InvalidRequest      (a ValueError) the gateway refuses the request as it is: change it
├── ModelNotFound       no such model is served
├── Overloaded          too many requests: try again after `retry_after` seconds
├── Unavailable         no gateway at this address, or no workers behind it, or they went away: try again later
├── DeadlineExceeded    (a TimeoutError) the answer was not complete in time
├── Unauthenticated     the gateway asks for a token, or does not take this one
├── Cancelled           the call was cancelled, or tried anew with the same request_id
└── ServerError         something went wrong on the other side

Needs grpc and protobuf, nothing else: no torch, no transformers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc

from kvferry.deploy.client_access import ClientAccess
from kvferry.deploy.client_errors import (
    Cancelled,
    ClientError,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    ServerError,
    Unauthenticated,
    Unavailable,
)
from kvferry.deploy.client_messages import (
    Choice,
    Chunk,
    Completion,
    GenerateOptions,
    Logprob,
    Message,
    Model,
    PromptOptions,
    Sampling,
    TokenCount,
    TokenLogprobs,
    Usage,
    Warmed,
    completion,
    count_request,
    generate_request,
    read_models,
    token_count,
    warm_request,
    warmed,
)
from kvferry.deploy.client_resume import Gateways, Resumption, RetryPolicy, split_addresses
from kvferry.proto import inference_pb2, inference_pb2_grpc

__all__ = [
    "DEFAULT_ADDRESS",
    "AsyncClient",
    "Cancelled",
    "Choice",
    "Chunk",
    "Client",
    "ClientAccess",
    "ClientError",
    "Completion",
    "DeadlineExceeded",
    "GenerateOptions",
    "InvalidRequest",
    "Logprob",
    "Message",
    "Model",
    "ModelNotFound",
    "Overloaded",
    "PromptOptions",
    "RetryPolicy",
    "Sampling",
    "ServerError",
    "TokenCount",
    "TokenLogprobs",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "Warmed",
]

DEFAULT_ADDRESS = "127.0.0.1:7600"

T = TypeVar("T")


class Client:
    """Connections to one or more gateways. Safe to use from several threads."""

    def __init__(
        self,
        address: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        access: ClientAccess | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """`access`: None: as the environment says, see `ClientAccess.find`. Raises ValueError without an address."""
        self._gateways = Gateways(split_addresses(address))
        self._retry = retry or RetryPolicy()
        access = access or ClientAccess.find()
        self._channels = [access.channel(one) for one in self._gateways.addresses]
        self._stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in self._channels]

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole answer to a text, or to the `messages` or `token_ids` in its place."""
        return completion(list(self.stream(prompt, **options)))

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Iterator[Chunk]:
        """The answer piece by piece, asked for with the first `next`. Closing the iterator cancels the request."""
        return self._stream(generate_request(prompt, options), options.get("timeout"))

    def count_tokens(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> TokenCount:
        """How many tokens a prompt is, after the chat template."""
        request, timeout = count_request(prompt, options), options.get("timeout")
        return token_count(self._ask(lambda stub: stub.CountTokens(request, timeout=timeout)))

    def warm(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> Warmed:
        """Has the prompt's complete blocks computed and stored ahead, when prefill is idle; waits until they are.

        A later prompt that begins in the same way finds them.
        """
        request, timeout = warm_request(prompt, options), options.get("timeout")
        return warmed(self._ask(lambda stub: stub.Warm(request, timeout=timeout)))

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """What is served; empty while no workers are ready."""
        request = inference_pb2.ListModelsRequest()
        return read_models(self._ask(lambda stub: stub.ListModels(request, timeout=timeout)))

    def close(self) -> None:
        self._gateways.closed = True
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, request: inference_pb2.GenerateRequest, timeout: float | None) -> Iterator[Chunk]:
        resumption = Resumption(request, self._gateways, timeout=timeout, policy=self._retry)
        while True:
            stub = self._stubs[resumption.index]
            call = stub.Generate(resumption.message(), timeout=resumption.seconds_left())
            try:
                for message in call:
                    yield resumption.take(message)
                resumption.end()
                return
            except grpc.RpcError as error:
                if resumption.is_complete:
                    return  # only the status was lost
                pause = resumption.after(error)
            finally:
                call.cancel()
            time.sleep(pause)

    def _ask(self, call: Callable[[inference_pb2_grpc.InferenceStub], T]) -> T:
        """The first answer of a gateway that is there."""
        for index in self._gateways.order():
            try:
                return call(self._stubs[index])
            except grpc.RpcError as error:
                failure = self._gateways.after(error, index)
        raise failure


class AsyncClient:
    """`Client` for asyncio. Make and use it in one event loop."""

    def __init__(
        self,
        address: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        access: ClientAccess | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """`access`: None: as the environment says, see `ClientAccess.find`. Raises ValueError without an address."""
        self._gateways = Gateways(split_addresses(address))
        self._retry = retry or RetryPolicy()
        access = access or ClientAccess.find()
        self._channels = [access.aio_channel(one) for one in self._gateways.addresses]
        self._stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in self._channels]

    async def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole answer to a text, or to the `messages` or `token_ids` in its place."""
        return completion([chunk async for chunk in self.stream(prompt, **options)])

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> AsyncGenerator[Chunk, None]:
        """The answer piece by piece, asked for with the first `anext`. Closing the iterator cancels the request."""
        return self._stream(generate_request(prompt, options), options.get("timeout"))

    async def count_tokens(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> TokenCount:
        """How many tokens a prompt is, after the chat template."""
        request, timeout = count_request(prompt, options), options.get("timeout")
        return token_count(await self._ask(lambda stub: stub.CountTokens(request, timeout=timeout)))

    async def warm(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> Warmed:
        """Has the prompt's complete blocks computed and stored ahead, when prefill is idle; waits until they are.

        A later prompt that begins in the same way finds them.
        """
        request, timeout = warm_request(prompt, options), options.get("timeout")
        return warmed(await self._ask(lambda stub: stub.Warm(request, timeout=timeout)))

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """What is served; empty while no workers are ready."""
        request = inference_pb2.ListModelsRequest()
        return read_models(await self._ask(lambda stub: stub.ListModels(request, timeout=timeout)))

    async def close(self) -> None:
        self._gateways.closed = True
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _stream(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[Chunk, None]:
        resumption = Resumption(request, self._gateways, timeout=timeout, policy=self._retry)
        while True:
            stub = self._stubs[resumption.index]
            call = stub.Generate(resumption.message(), timeout=resumption.seconds_left())
            try:
                async for message in call:
                    yield resumption.take(message)
                resumption.end()
                return
            except grpc.RpcError as error:
                if resumption.is_complete:
                    return  # only the status was lost
                pause = resumption.after(error)
            finally:
                call.cancel()
            await asyncio.sleep(pause)

    async def _ask(self, call: Callable[[inference_pb2_grpc.InferenceAsyncStub], Awaitable[T]]) -> T:
        """The first answer of a gateway that is there."""
        for index in self._gateways.order():
            try:
                return await call(self._stubs[index])
            except grpc.RpcError as error:
                failure = self._gateways.after(error, index)
        raise failure
