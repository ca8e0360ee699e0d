"""Clients of a cluster: requests whose tokens are known from a run without faults, one after the other."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from kvferry.deploy.client import AsyncClient, ClientAccess

MAX_TOKENS = 48
TIMEOUT_S = 120.0


def options(number: int) -> dict[str, Any]:
    """Request `number`: every second one is sampled, every fifth has two answers."""
    sampled = {"temperature": 0.9, "seed": number} if number % 2 else {}
    several = {"n": 2, "temperature": 0.9, "seed": number} if number % 5 == 4 else {}
    return {"max_tokens": MAX_TOKENS, "ignore_eos": True, "timeout": TIMEOUT_S, **sampled, **several}


@dataclass
class Load:
    """`num_clients` clients that ask until `stop`."""

    gateways: list[str]
    prompts: list[list[int]]
    num_clients: int = 4
    access: ClientAccess = field(default_factory=ClientAccess)
    """What the gateways ask for."""
    oracle: dict[int, dict[int, list[int]]] = field(default_factory=dict)
    num_done: int = 0
    problems: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """(when it began, seconds) of the pauses between two chunks of an answer that were longer than half a second."""

    async def learn(self) -> None:
        """What each request's tokens are, without faults."""
        async with AsyncClient(self.gateways, access=self.access) as client:
            for number in range(len(self.prompts)):
                self.oracle[number] = await self._ask(client, number)

    async def __aenter__(self) -> Load:
        self._stopping = False
        self._numbers = iter(range(10**9))
        self._tasks = [asyncio.create_task(self._run()) for _ in range(self.num_clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def until_done(self, count: int) -> None:
        """Until `count` requests have ended since the start."""
        while self.num_done < count:
            await asyncio.sleep(0.05)

    def longest_gap_after(self, when: float) -> float:
        """Seconds that a client waited for the next token, at worst, since `when`."""
        return max((length for began, length in self.gaps if began + length >= when), default=0.0)

    async def _run(self) -> None:
        async with AsyncClient(self.gateways, access=self.access) as client:
            while not self._stopping:
                place = next(self._numbers)
                client._gateways.current = place % len(self.gateways)  # so that every gateway has requests
                number = place // 2 % len(self.prompts)
                try:
                    if await self._ask(client, number) != self.oracle[number]:
                        self.problems.append(f"request {number} has other tokens")
                except Exception as error:
                    self.problems.append(f"request {number}: {type(error).__name__}: {error}")
                self.num_done += 1

    async def _ask(self, client: AsyncClient, number: int) -> dict[int, list[int]]:
        """Tokens by choice. Raises AssertionError for an index that is missing or comes twice."""
        answers: dict[int, list[int]] = {}
        last = time.monotonic()
        async for chunk in client.stream(token_ids=self.prompts[number], **options(number)):
            now = time.monotonic()
            if now - last > 0.5:
                self.gaps.append((last, now - last))
            last = now
            tokens = answers.setdefault(chunk.choice, [])
            assert chunk.index == len(tokens), f"token {chunk.index} where {len(tokens)} was due"
            tokens.extend(chunk.token_ids)
        assert all(len(tokens) == MAX_TOKENS for tokens in answers.values()), "an answer is not complete"
        return answers
