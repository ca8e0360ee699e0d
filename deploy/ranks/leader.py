"""The leader's side of a group: it starts the followers, tells them what to execute, and executes it, too."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from kvferry.deploy.model_config import ModelConfig, resolve_device
from kvferry.deploy.models import find_model
from kvferry.deploy.rank_model import RankModel
from kvferry.deploy.ranks.collectives import ProcessGroup
from kvferry.deploy.ranks.errors import RanksLost
from kvferry.deploy.ranks.followers import Followers, visible_devices
from kvferry.deploy.ranks.shard_model import check_group_size

logger = logging.getLogger(__name__)


class RankGroup:
    """The followers of this process and the ordered stream of commands to them.

    A command is a map: `op` names it, the rest are its arguments. Commands without collectives may come from any
    thread; those with collectives run one at a time (`together`), on all ranks in the same order.
    """

    def __init__(self, config: ModelConfig, *, on_lost: Callable[[str], None]) -> None:
        """Starts `config.tensor_parallel` - 1 followers with the threads that this process has, and loads the model's
        shards. `on_lost(reason)` is called, on any thread, when a rank ends or hangs later: the process cannot go on.

        Raises ValueError for a configuration that cannot be, RanksLost when a rank does not start.
        """
        size = config.tensor_parallel
        device = resolve_device(config.device)
        check_group_size(AutoConfig.from_pretrained(find_model(config.model).path), size)
        self._on_lost = on_lost
        self._started = False
        self._turn = threading.Lock()
        self._followers = Followers(visible_devices(size, device), on_lost=self._when_lost)
        folder = Path(tempfile.mkdtemp(prefix="kvferry-ranks-"))
        try:
            common = {"size": size, "folder": str(folder), "threads": torch.get_num_threads()}
            start = {"op": "start", **common, "config": config.to_message()}
            self._followers.send_each(lambda rank: start | {"rank": rank})
            team = ProcessGroup(folder, 0, size, device, is_lost=lambda: bool(self._followers.lost_because))
            self.rank = RankModel(config, team)
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

    def send(self, message: dict[str, Any], *, fds: Sequence[int] = (), keep: object = None) -> None:
        """A command for all followers; never waits. `keep` lives as long as `fds` are needed."""
        self._followers.send(message, fds=fds, keep=keep)

    def send_each(self, message_for: Callable[[int], dict[str, Any]]) -> None:
        """The same command with other arguments for each: `message_for(rank)`."""
        self._followers.send_each(message_for)

    @contextmanager
    def together(self, message: dict[str, Any]) -> Iterator[None]:
        """Sends a command with collectives; the context is this rank's part of it. Whatever is raised in there leaves
        the ranks out of step: the group is lost then, and RanksLost is raised."""
        with self._turn:
            if self._followers.lost_because:
                raise RanksLost(self._followers.lost_because)
            self.send(message)
            try:
                yield
            except Exception as error:
                self._followers.lost(f"{message['op']} failed: {error}")
                raise RanksLost(self._followers.lost_because or str(error)) from error

    def close(self) -> None:
        """Ends the followers. Safe to call twice."""
        self._followers.close()

    def _when_lost(self, reason: str) -> None:
        if self._started:  # else `__init__` raises
            self._on_lost(reason)
