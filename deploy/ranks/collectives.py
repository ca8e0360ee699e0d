"""What the ranks of a group compute together. Every rank calls the same functions in the same order.

Sums are taken in the order of the ranks, on gathered parts. An all-reduce would move less, but its order of additions
depends on where in the tensor an element lies: with three ranks over gloo a fifth of a row's elements had other bits
in a batch of 4 rows than in one of 256 (docs/log.md). Blocks would then depend on a pass's width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT_S = 60.0
"""Longest wait of a rank for the others in one collective."""
MEETING_TIMEOUT_S = 600.0
"""Longest wait for ranks that load their shard."""
MEETING_POLL_S = 0.02


class Collectives(Protocol):
    """Raises RuntimeError when another rank is gone, or does not come within the time."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all ranks' `part`, added in fp32 in the order of ranks, in `part`'s dtype and shape."""
        ...

    def concatenate(self, part: Tensor) -> Tensor:
        """All ranks' `part` [..., n], equal in shape, in the order of ranks: [..., size * n]."""
        ...

    def all_true(self, flag: bool) -> bool:
        """Whether every rank says so."""
        ...

    def meet(self) -> None:
        """Waits until every rank has come so far, longer than in a collective: for what takes long at start."""
        ...


class Alone:
    """A group of one."""

    rank = 0
    size = 1

    def sum(self, part: Tensor) -> Tensor:
        return part

    def concatenate(self, part: Tensor) -> Tensor:
        return part

    def all_true(self, flag: bool) -> bool:
        return flag

    def meet(self) -> None:
        """Nobody else comes."""


class ProcessGroup:
    """`Collectives` over torch.distributed: NCCL between GPUs, gloo between processes on CPUs.

    It is an object of its own and not torch's default group, so that a process may lead several.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        device: torch.device,
        *,
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        """All ranks name the same empty `folder`, where they find each other. Waits for all of them. `is_lost`: whether
        one is known to be gone."""
        self.rank = rank
        self.size = size
        self._device = device
        self._is_lost = is_lost
        self._num_meetings = 0
        self._store = store = dist.FileStore(str(folder / "rendezvous"), size)  # type: ignore[attr-defined]
        self._group = _nccl(store, rank, size) if device.type == "cuda" else _gloo(store, rank, size)

    def sum(self, part: Tensor) -> Tensor:
        parts = self._gather(part)
        total = parts[0].to(torch.float32, copy=True)
        for other in parts[1:]:
            total += other
        return total.to(part.dtype)

    def concatenate(self, part: Tensor) -> Tensor:
        return torch.cat(list(self._gather(part)), dim=-1)

    def all_true(self, flag: bool) -> bool:
        return bool(self._gather(torch.tensor([flag], dtype=torch.uint8, device=self._device)).all())

    def meet(self) -> None:
        self._num_meetings += 1
        self._store.set(f"meeting-{self._num_meetings}-{self.rank}", "here")
        wanted = [f"meeting-{self._num_meetings}-{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + MEETING_TIMEOUT_S
        while not self._store.check(wanted):
            if self._is_lost() or time.monotonic() > deadline:
                raise RuntimeError("not all ranks came to where they meet")
            time.sleep(MEETING_POLL_S)

    def _gather(self, part: Tensor) -> Tensor:
        """[size, *part.shape]"""
        gathered = part.new_empty(self.size * part.numel())
        self._group._allgather_base(gathered, part.reshape(-1)).wait()
        return gathered.view(self.size, *part.shape)


def _gloo(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # By itself it would listen on the address of the machine's name.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=TIMEOUT_S)
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=TIMEOUT_S)
    return dist.ProcessGroupNCCL(store, rank, size, options)
