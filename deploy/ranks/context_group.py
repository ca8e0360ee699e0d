"""The leader's side of a group that divides contexts: it starts the followers and tells them what to execute."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvferry.deploy.ranks.collectives import ProcessGroup
from kvferry.deploy.ranks.context_share import ShareConfig
from kvferry.deploy.ranks.errors import RanksLost
from kvferry.deploy.ranks.followers import Followers, visible_devices

logger = logging.getLogger(__name__)

PROGRAM = "kvferry.deploy.ranks.context_follower"


class ContextGroup:
    """The followers and the ordered streams of commands to them. Commands may come from any thread; steps run one at a
    time (`together`)."""

    def __init__(
        self,
        config: ShareConfig,
        *,
        size: int,
        device: torch.device,
        kernels: str | None,
        kernels_name: str,
        on_lost: Callable[[str], None],
    ) -> None:
        """Starts `size` - 1 followers with the threads that this process has. `kernels`: as for `select_kernels`, which
        must find `kernels_name` there, too. `on_lost(reason)` is called, on any thread, when a rank ends or hangs
        later: the process cannot go on.

        Raises ValueError for fewer GPUs than ranks, RanksLost when a rank does not start.
        """
        self.size = size
        self._on_lost = on_lost
        self._started = False
        self._turn = threading.Lock()
        self._followers = Followers(visible_devices(size, device), on_lost=self._when_lost, program=PROGRAM)
        folder = Path(tempfile.mkdtemp(prefix="kvferry-context-"))
        start = {
            "op": "start",
            "size": size,
            "folder": str(folder),
            "threads": torch.get_num_threads(),
            "device": device.type,
            "kernels": kernels,
            "kernels_name": kernels_name,
            "config": config.to_message(),
        }
        try:
            self._followers.send_each(lambda rank: start | {"rank": rank})
            self.team = ProcessGroup(folder, 0, size, device, is_lost=lambda: bool(self._followers.lost_because))
            self.team.meet()
            self.team.all_true(True)  # so that nobody still looks for others in `folder`
            self._started = True
        except Exception as error:
            self._followers.close()
            if self._followers.lost_because:
                raise RanksLost(f"{self._followers.lost_because} while it started: its output says why") from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def pids(self) -> list[int]:
        """Process ids of the followers, in the order of ranks."""
        return self._followers.pids

    def send_to(self, rank: int, message: dict[str, Any]) -> None:
        """A command for one follower; never waits."""
        self._followers.send_to(rank, message)

    def send_each(self, message_for: Callable[[int], dict[str, Any]]) -> None:
        """The same command with other arguments for each: `message_for(rank)`; never waits."""
        self._followers.send_each(message_for)

    @contextmanager
    def together(self, message_for: Callable[[int], dict[str, Any]]) -> Iterator[None]:
        """Sends a command with exchanges; the context is this rank's part of it. Whatever is raised in there leaves the
        ranks out of step: the group is lost then, and RanksLost is raised."""
        with self._turn:
            if self._followers.lost_because:
                raise RanksLost(self._followers.lost_because)
            self.send_each(message_for)
            try:
                yield
            except Exception as error:
                self._followers.lost(f"a decode step over {self.size} ranks failed: {error}")
                raise RanksLost(self._followers.lost_because or str(error)) from error

    def close(self) -> None:
        """Ends the followers. Safe to call twice."""
        self._followers.close()

    def _when_lost(self, reason: str) -> None:
        if self._started:  # else `__init__` raises
            self._on_lost(reason)
