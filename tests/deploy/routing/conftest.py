"""Workers that only have a state, and a clock that is set by hand."""

import pytest

from kvferry.deploy.routing.candidates import Candidates
from kvferry.deploy.routing.prefix import PrefixRouter
from kvferry.deploy.routing.router import RoutedRequest
from kvferry.deploy.routing.worker_state import WorkerState
from kvferry.proto import worker_pb2

BLOCK = 16
IDENTITY = worker_pb2.ModelIdentity(
    weights_digest=b"w" * 32,
    tokenizer_digest=b"t" * 32,
    spec_digest=b"s" * 32,
    layout_version=1,
    numerics_class=b"n" * 32,
)


class Fleet:
    """Prefill workers p0, p1, ... and decode workers d0, d1, ...; `now` is the time."""

    BLOCK = BLOCK

    def __init__(self, prefills=3, decodes=2, *, alone=False, max_model_len=4096):
        self.now = 1000.0
        self.max_model_len = max_model_len
        role = ["prefill", "decode"] if alone else ["decode"]
        self.prefills = [self.worker(f"p{i}:1", ["prefill"]) for i in range(0 if alone else prefills)]
        self.decodes = [self.worker(f"d{i}:1", role) for i in range(decodes)]

    def worker(self, address, roles):
        worker = WorkerState(address)
        worker.info = worker_pb2.WorkerInfo(
            roles=roles, identity=IDENTITY, block_size=BLOCK, block_bytes=1000, max_model_len=self.max_model_len
        )
        return worker

    def clock(self):
        return self.now

    def router(self, **options):
        return PrefixRouter(clock=self.clock, seed=0, **options)

    @property
    def candidates(self):
        return Candidates.of(self.decodes, self.prefills, has_prefills=bool(self.prefills))

    def report(self, worker, *, decode=None, **prefill):
        stats = {"token_seconds": 0.01, "uses_store": True, "fetch_bytes_per_second": 1e9} | prefill
        message = worker_pb2.WorkerStats(prefill=worker_pb2.PrefillStats(**stats))
        message.decode.CopyFrom(
            worker_pb2.DecodeStats(**({"pool_blocks": 1000, "step_seconds": 0.01} | (decode or {})))
        )
        worker.load.heard(message, asked_at=self.now)

    def report_all(self, **prefill):
        for worker in (*self.prefills, *self.decodes):
            self.report(worker, **prefill)

    @staticmethod
    def request(token_ids, *, tenant="a", max_tokens=8):
        return RoutedRequest(tenant=tenant, token_ids=token_ids, max_tokens=max_tokens)

    @staticmethod
    def serve(router, candidates, request):
        """The request's route, once its first token is there."""
        route = router.pick(candidates, request)
        with route.prefilling():
            pass
        return route


@pytest.fixture
def fleet():
    return Fleet
