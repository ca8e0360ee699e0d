"""A group of ranks that loses one: the worker ends, others take over, and no process is left."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.processes import RankWorkerProcess
from support.rank_models import save_model

from kvferry.deploy.assembly import make_gateway
from kvferry.deploy.client import AsyncClient
from kvferry.deploy.ranks import followers
from kvferry.deploy.ranks.errors import RanksLost
from kvferry.deploy.ranks.leader import RankGroup
from kvferry.deploy.settings import Settings
from kvferry.deploy.worker_server import RANKS_LOST, ModelConfig, ModelRuntime, WorkerServer
from kvferry.kernels.spec import KVQuantSpec
from kvferry.prefill.config import PrefillConfig
from kvferry.proto import worker_pb2, worker_pb2_grpc

BLOCK_SIZE = 32
MAX_TOKENS = 300
ENDS_WITHIN_S = 20.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model("llama", tmp_path_factory.mktemp("rank-faults")))


@pytest.fixture
def start_worker(model: str, tmp_path: Path) -> Iterator[Callable[..., RankWorkerProcess]]:
    started: list[RankWorkerProcess] = []
    numbers = itertools.count()

    def start(kind: str = "tensor_parallel") -> RankWorkerProcess:
        log = tmp_path / f"worker-{next(numbers)}.log"
        started.append(RankWorkerProcess(log, model, block_size=BLOCK_SIZE, ranks=2, kind=kind))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()


def await_end(pid: int) -> None:
    deadline = time.monotonic() + ENDS_WITHIN_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} has not ended"
        time.sleep(0.05)


async def is_decoding(worker: RankWorkerProcess) -> bool:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stats = await worker_pb2_grpc.WorkerStub(channel).Stats(worker_pb2.StatsRequest(), timeout=10)
    return bool(stats.decode.num_running)


@pytest.mark.parametrize("kind", ["tensor_parallel", pytest.param("context_parallel", marks=pytest.mark.deep)])
async def test_a_killed_follower_ends_its_worker_and_the_answer_goes_on_elsewhere(
    model: str, start_worker: Callable[..., RankWorkerProcess], make_prompt: Any, kind: str
) -> None:
    spec = KVQuantSpec(block_size=BLOCK_SIZE)
    runtime = ModelRuntime(ModelConfig(model=model, served_name="tiny", spec=spec, dtype="float32"))
    prefill = WorkerServer(runtime, config=PrefillConfig(), store_address=None)
    prefill_address = await prefill.start()
    workers = await asyncio.gather(*(asyncio.to_thread(start_worker, kind) for _ in range(2)))
    settings = Settings.load(model=model, served_model_name="tiny", gateway={"port": 0})
    gateway = await make_gateway(settings, prefill=[prefill_address], decode=[w.address for w in workers])
    port = await gateway.start()
    try:
        await gateway.wait_until_serving(60)
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            prompt = make_prompt(3 * BLOCK_SIZE)
            whole = await client.generate(token_ids=prompt, max_tokens=MAX_TOKENS, ignore_eos=True)
            while [w for w in workers if await is_decoding(w)]:
                await asyncio.sleep(0.05)
            tokens: list[int] = []
            killed: RankWorkerProcess | None = None
            async for chunk in client.stream(token_ids=prompt, max_tokens=MAX_TOKENS, ignore_eos=True):
                tokens += chunk.token_ids
                if killed is None:
                    (killed,) = [w for w in workers if await is_decoding(w)]
                    os.kill(killed.follower_pids[0], signal.SIGKILL)
            assert killed is not None
            assert tokens == list(whole.token_ids)
            assert await asyncio.to_thread(killed.popen.wait, ENDS_WITHIN_S) == RANKS_LOST
            assert "rank 1 ended" in killed.log.read_text()
    finally:
        await gateway.stop(0.2)
        await prefill.stop(0.2)
        runtime.close()


def test_the_leader_tells_what_each_rank_uses(start_worker: Callable[[], RankWorkerProcess]) -> None:
    worker = start_worker()
    with urllib.request.urlopen(f"http://127.0.0.1:{worker.metrics_port}/metrics", timeout=30) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    pids = [worker.popen.pid, *worker.follower_pids]

    def by_rank(name: str) -> dict[str, float]:
        return {s.labels["rank"]: s.value for family in families if family.name == name for s in family.samples}

    told, cpu = by_rank("kvferry_rank_resident_memory_bytes"), by_rank("kvferry_rank_cpu_seconds")
    assert told.keys() == cpu.keys() == {str(rank) for rank in range(len(pids))}
    for rank, pid in enumerate(pids):
        assert told[str(rank)] == pytest.approx(psutil.Process(pid).memory_info().rss, rel=0.2)
        assert 0 < cpu[str(rank)] <= sum(psutil.Process(pid).cpu_times()[:2])


def test_followers_end_with_their_leader(start_worker: Callable[[], RankWorkerProcess]) -> None:
    worker = start_worker()
    worker.signal(signal.SIGKILL)
    for pid in worker.follower_pids:
        await_end(pid)


def test_a_follower_that_hangs_is_found(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []
    lost = threading.Event()

    def on_lost(reason: str) -> None:
        reasons.append(reason)
        lost.set()

    config = ModelConfig(model=model, dtype="float32", spec=KVQuantSpec(block_size=BLOCK_SIZE), tensor_parallel=2)
    group = RankGroup(config, on_lost=on_lost)
    try:
        monkeypatch.setattr(followers, "SILENT_S", 2.0)
        (pid,) = group.pids
        os.kill(pid, signal.SIGSTOP)
        assert lost.wait(ENDS_WITHIN_S)
        assert reasons == ["rank 1 has not answered for 2 s"]
        with pytest.raises(RanksLost, match="has not answered"), group.together({"op": "prefill.run"}):
            pass
    finally:
        group.close()
    await_end(pid)


@pytest.mark.parametrize(("size", "problem"), [(3, "3 ranks cannot share 4 KV heads"), (16, "8 query heads")])
def test_a_size_that_does_not_fit_is_refused(size: int, problem: str, model: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ModelRuntime(ModelConfig(model=model, dtype="float32", tensor_parallel=size))
