"""The Python client.

    with Client("127.0.0.1:7600") as client:
        print(client.generate(messages=[{"role": "user", "content": "Hello"}], max_tokens=64).text)
        for chunk in client.stream(prompt="Once upon a time"):
            print(chunk.text, end="")

ClientError
├── InvalidRequest      (a ValueError) the gateway refuses the request as it is: change it
├── ModelNotFound       no such model is served
├── Overloaded          too many requests: try again after `retry_after` seconds
├── Unavailable         no gateway at this address, or no workers behind it, or they went away: try again later
├── DeadlineExceeded    (a TimeoutError) the answer was not complete in time
├── Cancelled           the call was cancelled
└── ServerError         something went wrong on the other side

Needs grpc and protobuf, nothing else: no torch, no transformers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from types import TracebackType
from typing import Self, Unpack

import grpc

from kvferry.deploy.client_errors import (
    Cancelled,
    ClientError,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    ServerError,
    Unavailable,
    friendly_errors,
)
from kvferry.deploy.client_messages import (
    Choice,
    Chunk,
    ChunkReader,
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
from kvferry.proto import inference_pb2, inference_pb2_grpc
from kvferry.proto.grpc_options import channel_options

__all__ = [
    "DEFAULT_ADDRESS",
    "AsyncClient",
    "Cancelled",
    "Choice",
    "Chunk",
    "Client",
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
    "Sampling",
    "ServerError",
    "TokenCount",
    "TokenLogprobs",
    "Unavailable",
    "Usage",
    "Warmed",
]

DEFAULT_ADDRESS = "127.0.0.1:7600"


class Client:
    """One connection to a gateway. Safe to use from several threads."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._address = address
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=channel_options())
        else:
            self._channel = grpc.secure_channel(address, credentials, options=channel_options())
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole answer to a text, or to the `messages` or `token_ids` in its place."""
        return completion(list(self.stream(prompt, **options)))

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Iterator[Chunk]:
        """The answer piece by piece, asked for with the first `next`. Closing the iterator cancels the request."""
        return self._stream(generate_request(prompt, options), options.get("timeout"))

    def count_tokens(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> TokenCount:
        """How many tokens a prompt is, after the chat template."""
        request = count_request(prompt, options)
        with friendly_errors(self._address):
            return token_count(self._stub.CountTokens(request, timeout=options.get("timeout")))

    def warm(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> Warmed:
        """Has the prompt's complete blocks computed and stored ahead, when prefill is idle; waits until they are.

        A later prompt that begins in the same way finds them.
        """
        request = warm_request(prompt, options)
        with friendly_errors(self._address):
            return warmed(self._stub.Warm(request, timeout=options.get("timeout")))

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """What is served; empty while no workers are ready."""
        with friendly_errors(self._address):
            return read_models(self._stub.ListModels(inference_pb2.ListModelsRequest(), timeout=timeout))

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, request: inference_pb2.GenerateRequest, timeout: float | None) -> Iterator[Chunk]:
        with friendly_errors(self._address):
            call = self._stub.Generate(request, timeout=timeout)
            order = ChunkReader(request.sampling.n)
            try:
                for message in call:
                    yield order.next(message)
                order.end()
            finally:
                call.cancel()


class AsyncClient:
    """`Client` for asyncio. Make and use it in one event loop."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._address = address
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=channel_options())
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=channel_options())
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole answer to a text, or to the `messages` or `token_ids` in its place."""
        return completion([chunk async for chunk in self.stream(prompt, **options)])

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> AsyncGenerator[Chunk, None]:
        """The answer piece by piece, asked for with the first `anext`. Closing the iterator cancels the request."""
        return self._stream(generate_request(prompt, options), options.get("timeout"))

    async def count_tokens(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> TokenCount:
        """How many tokens a prompt is, after the chat template."""
        request = count_request(prompt, options)
        with friendly_errors(self._address):
            return token_count(await self._stub.CountTokens(request, timeout=options.get("timeout")))

    async def warm(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> Warmed:
        """Has the prompt's complete blocks computed and stored ahead, when prefill is idle; waits until they are.

        A later prompt that begins in the same way finds them.
        """
        request = warm_request(prompt, options)
        with friendly_errors(self._address):
            return warmed(await self._stub.Warm(request, timeout=options.get("timeout")))

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """What is served; empty while no workers are ready."""
        with friendly_errors(self._address):
            return read_models(await self._stub.ListModels(inference_pb2.ListModelsRequest(), timeout=timeout))

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _stream(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[Chunk, None]:
        with friendly_errors(self._address):
            call = self._stub.Generate(request, timeout=timeout)
            order = ChunkReader(request.sampling.n)
            try:
                async for message in call:
                    yield order.next(message)
                order.end()
            finally:
                call.cancel()
