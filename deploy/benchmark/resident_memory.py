"""What the operating system says this process holds in memory (Linux)."""

from __future__ import annotations

import ctypes
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def resident_bytes() -> int:
    """Resident now, mapped files included. Raises OSError where /proc is not."""
    return _field("VmRSS")


def peak_bytes() -> int:
    """The most that was resident since the start or the last `reset_peak`."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Makes `peak_bytes` count from now on. Raises OSError where the kernel does not let it."""
    _CLEAR_REFS.write_text(_RESET_PEAK)


def return_freed_memory() -> None:
    """Gives what is freed but kept by malloc back, so that a later peak counts it again. Nothing but glibc has it."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return
    trim(ctypes.c_size_t(0))


def available_bytes() -> int:
    """What the machine could give to new processes without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo does not say MemAvailable")


def _field(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} does not say {name}")
