"""What a router may know of a worker. No I/O: the gateway's pool and the simulation both fill it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from kvferry.deploy.routing.load import WorkerLoad
from kvferry.proto import worker_pb2

_use_counter = itertools.count(1)


class WorkerState:
    """One worker: what it is, what it last said of its load, and what this gateway has sent it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.info: worker_pb2.WorkerInfo | None = None  # None: not usable now
        self.load = WorkerLoad()
        self.num_outstanding = 0
        self.last_used = 0

    def has_role(self, role: str) -> bool:
        return self.info is not None and role in self.info.roles

    @contextmanager
    def in_use(self) -> Iterator[None]:
        self.num_outstanding += 1
        self.last_used = next(_use_counter)
        try:
            yield
        finally:
            self.num_outstanding -= 1
