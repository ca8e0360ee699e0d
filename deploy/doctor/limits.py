"""What the system lets a process have: open files, memory, shared memory, a clock."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from kvferry.deploy.doctor.finding import Finding, gib, problem, warning
from kvferry.deploy.settings import Settings

OPEN_FILES = 4096
RAY_SHARED_BYTES = 80_000_000
"""Ray's smallest object store; nothing of ours goes through it."""
CGROUP = Path("/sys/fs/cgroup")
GOOD_CLOCKS = ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "xen", "arch_sys_counter")
MAX_DRIFT_S = 0.02
CLOCK_S = 0.1


def limit_findings(settings: Settings) -> Iterator[Finding]:
    yield _open_files()
    yield from _memory(settings)
    yield _cpu_quota()
    yield _shared_memory()
    yield from _clock()


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"{soft} (at most {hard})"
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        return warning("open files", value, f"connections and records need them: ulimit -n {OPEN_FILES}")
    return Finding("open files", value)


def planned_bytes(settings: Settings) -> int:
    """What the settings give to blocks and records on this machine; model weights come on top."""
    store = 0 if settings.store.nodes else (settings.store.memory or 0) * settings.store.count
    kv = settings.decode.kv_memory
    pools = int(kv) * settings.decode.count if isinstance(kv, int) else 0
    cache = (settings.store.worker_cache or 0) * (settings.prefill.count + settings.decode.count)
    return store + pools + cache


def _memory(settings: Settings) -> Iterator[Finding]:
    planned = planned_bytes(settings)
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    available, whose = memory.available, "this machine"
    limit = cgroup_limit()
    if limit is not None and limit < available:
        available, whose = limit, "the container (cgroup)"
    value = f"{gib(available)} free of {gib(memory.total)}; blocks and records take {gib(planned)}"
    if planned > available:
        reason = f"more than {whose} has: set a smaller store.memory or decode.kv_memory, else the kernel ends a worker"
        yield problem("memory", value, reason)
    elif planned > 0.8 * available:
        yield warning(
            "memory", value, "little is left for model weights: set a smaller store.memory or decode.kv_memory"
        )
    else:
        yield Finding("memory", value)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield warning("address space", gib(soft), "torch and Ray reserve much more than they use: ulimit -v unlimited")
    if swap.total and swap.percent > 10:
        reason = "blocks in swap are slower than computing them: free memory, or swapoff"
        yield warning("swap", f"{gib(swap.used)} of {gib(swap.total)} in use", reason)


def cgroup_limit(root: Path = CGROUP) -> int | None:
    """Bytes that this control group may still take; None without a limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            text = (root / limit).read_text().strip()
            if text == "max" or int(text) >= 1 << 60:
                return None
            return max(int(text) - int((root / used).read_text()), 0)
        except (OSError, ValueError):
            continue
    return None


def _cpu_quota(root: Path = CGROUP) -> Finding:
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (root / "cpu.max").read_text().split()
        share = float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        share = float("inf")
    if share < cores:
        reason = f"threads wait for the container's quota: set threads: {max(int(share), 1)}, or a larger quota"
        return warning("CPU quota", f"{share:g} of {cores} cores", reason)
    return Finding("CPU quota", f"all {cores} cores")


def _shared_memory(place: str = "/dev/shm") -> Finding:
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return warning(
            "shared memory", f"there is no {place}", "Ray then uses /tmp: start the container with --shm-size=256m"
        )
    if free < 2 * RAY_SHARED_BYTES:
        reason = "Ray wants 80 MB of it and else uses /tmp: start the container with --shm-size=256m"
        return warning("shared memory", f"{gib(free)} free in {place}", reason)
    return Finding("shared memory", f"{gib(free)} free in {place}")


def _clock() -> Iterator[Finding]:
    source = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    name = source.read_text().strip() if source.is_file() else "unknown"
    before = time.time(), time.monotonic()
    time.sleep(CLOCK_S)
    steps = time.time() - before[0], time.monotonic() - before[1]
    if abs(steps[0] - steps[1]) > MAX_DRIFT_S:
        yield warning(
            "clock",
            f"{name}; the time of day moved by {steps[0]:.3f} s while {steps[1]:.3f} s passed",
            "durations are right all the same; times in logs of several machines are not: look at chrony or ntpd",
        )
    elif name not in (*GOOD_CLOCKS, "unknown"):
        yield warning("clock", name, "reading it is slow, and workers read it for every token: prefer tsc")
    else:
        yield Finding("clock", name)
