"""Sends a workload in time and waits for all of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from kvferry.deploy.bench_serve.measure import Measured, measure, to_message
from kvferry.deploy.bench_serve.workload import PlannedRequest
from kvferry.proto import inference_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class Run:
    requests: list[Measured]  # in the order of the workload
    duration_s: float
    cpu_s: float  # processor time that this process used


async def run(
    stub: inference_pb2_grpc.InferenceAsyncStub,
    requests: Sequence[PlannedRequest],
    due_s: Sequence[float] | None,
    *,
    model: str = "",
    timeout_s: float,
    max_concurrency: int | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> Run:
    """Sends each request at its time, but never lets more than `max_concurrency` run. Ends when the last has ended.

    `due_s` None: each as soon as there is a place. Messages are made before the clock starts. A request's own times
    begin when it is sent, not when it is due.
    """
    messages = [to_message(request, model=model) for request in requests]
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    tasks: list[asyncio.Task[Measured]] = []
    cpu_before, started = time.process_time(), time.perf_counter()

    async def one(index: int) -> Measured:
        async with AsyncExitStack() as stack:
            if places is not None:
                stack.callback(places.release)
            due = None if due_s is None else due_s[index]
            done = await measure(
                stub, messages[index], requests[index], started=started, due_s=due, timeout_s=timeout_s
            )
        on_done()
        return done

    async with asyncio.TaskGroup() as group:
        for index in range(len(requests)):
            if due_s is not None and (wait := started + due_s[index] - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if places is not None:
                await places.acquire()
            tasks.append(group.create_task(one(index)))
    duration, cpu = time.perf_counter() - started, time.process_time() - cpu_before
    return Run(requests=[task.result() for task in tasks], duration_s=duration, cpu_s=cpu)
