"""The follower processes of a group, as their leader sees them: started, fed with commands, watched and ended."""

from __future__ import annotations

import logging
import os
import queue
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvferry.deploy.ranks.channel import Channel, pack
from kvferry.deploy.ranks.errors import RanksLost

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 300.0
"""Longest start of a follower up to the moment when it has imported what it needs."""
PULSE_S = 1.0
SILENT_S = 30.0
"""A follower that does not answer for so long hangs: it answers on a thread of its own, also while it computes."""
END_S = 5.0


class Follower:
    """One process and the sockets to it. Commands go through a thread, so that who sends never waits."""

    def __init__(self, rank: int, *, visible_devices: str | None) -> None:
        self.rank = rank
        commands, its_commands = socket.socketpair()
        self.pulse, its_pulse = socket.socketpair()
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        if visible_devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible_devices
        fds = (its_commands.fileno(), its_pulse.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "kvferry.deploy.ranks.follower", *map(str, fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        its_commands.close()
        its_pulse.close()
        self.channel = Channel(commands)
        self.pulse.setblocking(False)
        self.answered_at = time.monotonic() + HELLO_TIMEOUT_S
        # SimpleQueue: `put` may run inside another `put` of this thread, when the garbage collector drops a prompt.
        self._queue: queue.SimpleQueue[tuple[bytes, tuple[int, ...], object] | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name=f"to-rank-{rank}", daemon=True)
        self._sender.start()

    def send(self, packed: bytes, fds: tuple[int, ...], keep: object) -> None:
        """`keep` lives until the message is sent."""
        self._queue.put((packed, fds, keep))

    def end(self) -> None:
        """Ends the process, by force when it does not end by itself."""
        self._queue.put(None)
        self._sender.join(END_S)
        self.pulse.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(END_S)
        self.channel.close()

    def kill(self) -> None:
        self.process.kill()

    def _send_all(self) -> None:
        while (item := self._queue.get()) is not None:
            packed, fds, _ = item
            try:
                self.channel.send(packed, fds)
            except OSError:  # it is gone; who watches it says so
                return
            del item


class Followers:
    """All followers of one leader. `on_lost` is called once, on any thread, with the reason when one ends or hangs."""

    def __init__(self, devices: Sequence[str | None], *, on_lost: Callable[[str], None]) -> None:
        """Starts the ranks from 1 on; they wait for their first command. `devices`: `visible_devices`, of rank 0, too.

        Raises RanksLost when one does not come up.
        """
        self.lost_because = ""
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._closing = False
        self._wake, self._woken = socket.socketpair()
        self._followers = [Follower(rank, visible_devices=visible) for rank, visible in enumerate(devices) if rank > 0]
        self._watcher = threading.Thread(target=self._watch, name="rank-watcher", daemon=True)
        self._watcher.start()
        try:
            for follower in self._followers:
                self._await_hello(follower)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids in the order of ranks, from rank 1 on."""
        return [follower.process.pid for follower in self._followers]

    def send(self, message: dict[str, Any], *, fds: Sequence[int] = (), keep: object = None) -> None:
        """To every follower, behind what was sent before. Never waits; `keep` lives as long as `fds` are needed."""
        packed = pack(message, num_fds=len(fds))
        for follower in self._followers:
            follower.send(packed, tuple(fds), keep)

    def send_each(self, message_for: Callable[[int], dict[str, Any]]) -> None:
        """To every follower its own: `message_for(rank)`."""
        for follower in self._followers:
            follower.send(pack(message_for(follower.rank)), (), None)

    def lost(self, reason: str) -> None:
        """The group is broken: followers are ended and the worker is told."""
        with self._lock:
            if self.lost_because or self._closing:
                return
            self.lost_because = reason
        logger.error("the group of ranks is lost: %s", reason)
        for follower in self._followers:
            follower.kill()
        self._on_lost(reason)

    def close(self) -> None:
        """Ends all followers. Safe to call twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake.close()
        self._watcher.join()
        self.send({"op": "end"})
        for follower in self._followers:
            follower.end()

    def _await_hello(self, follower: Follower) -> None:
        heard: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=lambda: heard.put(follower.channel.receive()), daemon=True).start()
        try:
            hello = heard.get(timeout=HELLO_TIMEOUT_S)
        except queue.Empty:
            raise RanksLost(f"rank {follower.rank} did not start within {HELLO_TIMEOUT_S:.0f} s") from None
        if hello is None:
            raise RanksLost(f"rank {follower.rank} ended while it started: its output says why")
        follower.answered_at = time.monotonic()

    def _watch(self) -> None:
        with self._woken, selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ, None)
            for follower in self._followers:
                selector.register(follower.pulse, selectors.EVENT_READ, follower)
            beat_at = 0.0
            while not self.lost_because:
                now = time.monotonic()
                if now >= beat_at:
                    beat_at = now + PULSE_S
                    self._beat(now)
                for key, _ in selector.select(max(beat_at - time.monotonic(), 0.0)):
                    if key.data is None:
                        return
                    self._hear(key.data)

    def _beat(self, now: float) -> None:
        for follower in self._followers:
            if now - follower.answered_at > SILENT_S:
                self.lost(f"rank {follower.rank} has not answered for {SILENT_S:.0f} s")
                return
            try:
                follower.pulse.send(b"\0")
            except BlockingIOError:
                pass  # it does not read; its answers are late, then
            except OSError:
                self.lost(f"rank {follower.rank} ended")
                return

    def _hear(self, follower: Follower) -> None:
        try:
            answer = follower.pulse.recv(4096)
        except OSError:
            answer = b""
        if answer:
            follower.answered_at = time.monotonic()
        else:
            self.lost(f"rank {follower.rank} ended")


def visible_devices(size: int, device: torch.device) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each rank: one device each, of those that this process sees; None on a CPU.

    Raises ValueError when there are fewer than ranks.
    """
    if device.type != "cuda":
        return [None] * size
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [d for d in named.split(",") if d] if named else [str(i) for i in range(torch.cuda.device_count())]
    if len(devices) < size:
        raise ValueError(f"tensor_parallel: {size} ranks need as many GPUs, and this process sees {len(devices)}")
    return list(devices[:size])
