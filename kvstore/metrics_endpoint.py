"""Where a process tells Prometheus its metrics: GET /metrics on a port of its own, served by threads of its own.

    Prometheus ──HTTP──▶ thread ──asks, waits at most 2 s──▶ event loop: reads its counters
                           └── makes the text

So a scrape costs the event loop some reads, and a client that is slow or silent costs it nothing. Every process has
one; workers and the gateway use it, too.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from socketserver import BaseServer
from typing import Any, Protocol
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.exposition import MetricsHandler

_log = logging.getLogger(__name__)

PREFIX = "kvferry_"
"""Of every metric: kvferry_time_to_first_token_seconds where vLLM says vllm:time_to_first_token_seconds. A colon is
kept in one text format and becomes an underscore in another: the name would depend on who asks."""
SNAPSHOT_TIMEOUT_S = 2.0
"""How long a scrape waits for the event loop; then it is answered with 503."""
MAX_SCRAPES = 4
"""Scrapes at one time; more are closed unanswered."""
SILENT_CLIENT_S = 5.0

Families = Callable[[], Awaitable[Iterable[Metric]]]


class Collects(Protocol):
    """A registry, or anything else that has metrics."""

    def collect(self) -> Iterable[Metric]: ...


@dataclass(frozen=True, kw_only=True)
class MetricsPlace:
    """Where to listen. Raises ValueError for an impossible port."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: any free port; the log says which

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"the metrics port must be 0..65535, not {self.port}")


class MetricsEndpoint:
    """`start` and `stop` it on the event loop whose metrics it tells."""

    def __init__(self, place: MetricsPlace, families: Families, *, also: Sequence[Collects] = ()) -> None:
        """`families` runs on the event loop at each scrape and must not wait for long; `also` is read by the scrape's
        own thread. Metrics of the process itself (memory, CPU, open files) are added."""
        self._place = place
        self._families = families
        self._also = tuple(also)
        self._server: _Server | None = None

    async def start(self) -> int:
        """Listens and returns the port. Raises OSError when it cannot listen there."""
        of_process = CollectorRegistry()
        ProcessCollector(registry=of_process)
        on_loop = _OnLoop(asyncio.get_running_loop(), self._families)
        registry = CollectorRegistry(support_collectors_without_names=True)
        registry.register(_Joined([on_loop, *self._also, of_process]))
        host, port = self._place.host, self._place.port
        try:
            self._server = _Server(host, port, registry)
        except OSError as error:
            raise OSError(
                f"cannot serve metrics on {host}:{port}: {error.strerror or error}; "
                "choose another port (metrics.port_offset) or metrics.enabled: false"
            ) from error
        threading.Thread(target=self._server.serve_forever, args=(0.2,), name="metrics", daemon=True).start()
        port = int(self._server.server_address[1])
        _log.info("metrics on http://%s:%d/metrics", host, port)
        return port

    async def stop(self) -> None:
        """Ends within a moment; safe to call twice."""
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.shutdown)
            server.server_close()


class _LoopBusy(Exception):
    pass


class _Joined:
    """All of them as one, without the times at which counters began: those would double the series. A worker with two
    roles tells some metrics twice, with other labels: one family each."""

    def __init__(self, collectors: Sequence[Collects]) -> None:
        self._collectors = tuple(collectors)

    def collect(self) -> Iterable[Metric]:
        by_name: dict[str, Metric] = {}
        for collector in self._collectors:
            for family in collector.collect():
                joined = by_name.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                joined.samples += [sample for sample in family.samples if not sample.name.endswith("_created")]
        return by_name.values()


class _OnLoop:
    """Runs `families` on the event loop and waits for it, bounded, on the scrape's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, families: Families) -> None:
        self._loop = loop
        self._families = families

    def collect(self) -> Iterable[Metric]:
        async def read() -> list[Metric]:
            return list(await self._families())

        reading = asyncio.run_coroutine_threadsafe(read(), self._loop)
        try:
            return reading.result(SNAPSHOT_TIMEOUT_S)
        except TimeoutError:  # an OSError, which would look like a client that is gone
            raise _LoopBusy("the event loop did not answer in time") from None
        finally:
            reading.cancel()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._free = threading.BoundedSemaphore(MAX_SCRAPES)
        super().__init__((host, port), _Handler.factory(registry))

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away; nothing to tell."""


class _Handler(MetricsHandler):
    timeout = SILENT_CLIENT_S
    server_version = "kvferry"
    sys_version = ""

    def __init__(self, request: Any, client_address: Any, server: BaseServer) -> None:
        super().__init__(request, client_address, server)

    def do_GET(self) -> None:
        if urlsplit(self.path).path != "/metrics":
            self.send_error(404, "the metrics are at /metrics")
            return
        try:
            super().do_GET()
        except OSError:
            raise  # the client is gone
        except Exception as error:  # a scrape that fails must be seen in `up`, and must not end the thread with a trace
            _log.warning("a scrape failed with %s", type(error).__name__)
            self.send_error(503, "the process did not tell its counters in time")
