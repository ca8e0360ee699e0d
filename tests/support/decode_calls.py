"""Requests to a decode worker over its socket, and a look at what it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from kvferry.decode.admission import Admission
from kvferry.decode.cache import PackedCache
from kvferry.decode.engine import DecodeEngine
from kvferry.proto import worker_pb2, worker_pb2_grpc

ROOM_S = 5.0


@dataclass
class Inside:
    """The parts of a running decode worker that hold memory."""

    engine: DecodeEngine
    cache: PackedCache
    admission: Admission

    @classmethod
    def of(cls, workers: Any) -> Inside:
        engine, servicer = workers.decode_server._decode
        return cls(engine, engine._executor.memory, servicer._worker.admission)

    def leftovers(self) -> dict[str, int]:
        """What is in use; empty when all is free."""
        admission = self.admission
        counts = {
            "blocks": admission.pool.num_used,
            "slots": self.cache.tails.shape[0] - len(admission._slots),
            "waiting": admission.num_waiting,
            "growing": len(admission._growing),
            "swappable": len(admission._swappable),
            "leaving": len(admission._leaving),
            "sequences": self.engine.num_running,
        }
        return {name: count for name, count in counts.items() if count}

    async def assert_all_free(self) -> None:
        try:
            async with asyncio.timeout(ROOM_S):
                while self.leftovers():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            pytest.fail(f"still in use after {ROOM_S} s: {self.leftovers()}")
        self.admission.pool.check_integrity()
        assert sorted(self.admission._slots) == list(range(self.cache.tails.shape[0]))


def request(workers: Any, prompt: list[int], **changes: Any) -> worker_pb2.DecodeRequest:
    """A request that is good, except for `changes`."""
    fields: dict[str, Any] = {
        "request_id": "test",
        "tenant": "default",
        "token_ids": prompt,
        "prefill_address": workers.prefill_address,
        "sampling": worker_pb2.SamplingParams(max_tokens=8),
    }
    return worker_pb2.DecodeRequest(**{**fields, **changes})


def call(workers: Any, message: worker_pb2.DecodeRequest, timeout: float = 30.0) -> Any:
    return worker_pb2_grpc.DecodeStub(workers.channel).Generate(message, timeout=timeout)


async def read(stream: Any, count: int = 10**9) -> list[int]:
    """Up to `count` tokens of an answer."""
    tokens: list[int] = []
    while len(tokens) < count and (chunk := await stream.read()) is not grpc.aio.EOF:
        tokens.append(chunk.token_id)
    return tokens


async def failure(answer: Coroutine[Any, Any, object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return caught.value
