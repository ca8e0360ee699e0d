"""A gateway that computes nothing: tokens leave as fast as gRPC takes them, so that what is left is the client's time.

`python -m support.token_server` serves until it is killed; see docs/benchmarks.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from kvferry.proto import inference_pb2, inference_pb2_grpc
from kvferry.proto.grpc_options import server_options

MAX_MODEL_LEN = 8192
MODEL = "nothing"


class TokenServicer(inference_pb2_grpc.InferenceServicer):
    """`spoil` changes an answer's chunks before they are sent."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.num_running = 0
        self.most_running = 0
        self.hold = asyncio.Event()  # answers wait for it
        self.hold.set()
        self.models = [inference_pb2.Model(id=MODEL, max_model_len=MAX_MODEL_LEN)]

    def spoil(self, chunks: list[inference_pb2.GenerateChunk]) -> list[inference_pb2.GenerateChunk]:
        return chunks

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        self.requests.append(request)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await self.hold.wait()
            count = request.sampling.max_tokens
            chunks = [inference_pb2.GenerateChunk(index=i, text="x", token_ids=[7]) for i in range(count)]
            chunks[-1].finish_reason = "length"
            chunks[-1].usage.prompt_tokens = len(request.token_ids.ids)
            chunks[-1].usage.completion_tokens = count
            for chunk in self.spoil(chunks):
                yield chunk
        finally:
            self.num_running -= 1

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: Any
    ) -> inference_pb2.CountTokensReply:
        return inference_pb2.CountTokensReply(tokens=len(request.token_ids.ids), max_model_len=MAX_MODEL_LEN)

    async def ListModels(self, request: inference_pb2.ListModelsRequest, context: Any) -> inference_pb2.ListModelsReply:
        return inference_pb2.ListModelsReply(models=self.models)


async def start_token_server(servicer: TokenServicer, port: int = 0) -> tuple[grpc.aio.Server, str]:
    """(server, address)"""
    server = grpc.aio.server(options=server_options())
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def _main() -> None:
    server, address = await start_token_server(TokenServicer())
    print(f"serving on {address}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_main())
