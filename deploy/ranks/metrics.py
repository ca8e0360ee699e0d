"""What a worker's ranks use, told by their leader: ranks work in lock-step, so its counts of requests are theirs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import psutil
from prometheus_client.core import Metric

from kvferry.kvstore.metric_families import Described, counter, gauge

MEMORY = Described("rank_resident_memory_bytes", "Memory of a rank's process, without that of its GPU.")
CPU = Described("rank_cpu_seconds", "Processor time of a rank's process.")


def rank_families(follower_pids: Sequence[int], labels: Mapping[str, str]) -> Iterator[Metric]:
    """One sample a rank, this process's (rank 0) too; nothing where there are no others."""
    if not follower_pids:
        return
    memory, cpu = [], []
    for rank, pid in enumerate((os.getpid(), *follower_pids)):
        of_rank = {**labels, "rank": str(rank)}
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                resident, times = process.memory_info().rss, process.cpu_times()
        except psutil.NoSuchProcess:
            continue  # it ended just now, and so will this worker
        memory.append((of_rank, float(resident)))
        cpu.append((of_rank, times.user + times.system))
    yield gauge(MEMORY, memory)
    yield counter(CPU, cpu)
