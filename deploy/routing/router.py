"""The interface of the policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from kvferry.deploy.routing.candidates import Candidates
from kvferry.deploy.routing.worker_state import WorkerState

W = TypeVar("W", bound=WorkerState)


@dataclass(frozen=True, kw_only=True)
class RoutedRequest:
    """What a router may know of a request."""

    tenant: str
    token_ids: Sequence[int]
    max_tokens: int
    warm: bool = False
    """Only the prefill worker works, when nothing else waits."""


class Notice(Protocol):
    """What a policy hears of a request that it placed. Each is called once, in this order."""

    def sent(self) -> None: ...

    def prefilled(self, *, ok: bool) -> None:
        """The first token is there (or all blocks are published); not `ok`: it failed before."""
        ...


class Route(NamedTuple, Generic[W]):
    """A choice. Without `prefill`, the decode worker prefills by itself."""

    decode: W
    prefill: W | None
    notice: Notice

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        """Around the time from sending the request until its first token."""
        self.notice.sent()
        try:
            yield
        except BaseException:
            self.notice.prefilled(ok=False)
            raise
        self.notice.prefilled(ok=True)


class Router(Protocol):
    def pick(self, candidates: Candidates[W], request: RoutedRequest) -> Route[W]:
        """One of `candidates`, which is not empty. Sends nothing and waits for nothing."""
        ...


@dataclass(frozen=True)
class Unnoticed:
    """For policies that need not know."""

    def sent(self) -> None: ...

    def prefilled(self, *, ok: bool) -> None: ...


UNNOTICED = Unnoticed()
