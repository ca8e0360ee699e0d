"""A follower: `python -m kvferry.deploy.ranks.follower COMMANDS_FD PULSE_FD`, started by its leader only.

It executes what the leader sends until the leader ends it, or is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from kvferry.deploy.model_config import ModelConfig, resolve_device
from kvferry.deploy.rank_model import RankModel
from kvferry.deploy.ranks.channel import Channel, pack
from kvferry.deploy.ranks.collectives import ProcessGroup
from kvferry.deploy.ranks.decode import DecodeFollower
from kvferry.deploy.ranks.prefill import PrefillFollower

logger = logging.getLogger(__name__)

LEADER_GONE = 3
"""Exit status."""


def main(commands_fd: int, pulse_fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the leader, too, and it says when to end
    pulse = socket.socket(fileno=pulse_fd)
    threading.Thread(target=_answer, args=(pulse,), name="pulse", daemon=True).start()
    channel = Channel(socket.socket(fileno=commands_fd))
    channel.send(pack({"op": "hello"}))
    start = channel.receive()
    if start is None or start["op"] != "start":
        return
    rank = start["rank"]
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(name)s: %(message)s")
    torch.set_num_threads(start["threads"])
    config = ModelConfig.from_message(start["config"])
    team = ProcessGroup(Path(start["folder"]), rank, start["size"], resolve_device(config.device))
    model = RankModel(config, team)
    parts: dict[str, object] = {"prefill": PrefillFollower(model), "decode": DecodeFollower(model)}
    while (message := channel.receive()) is not None:
        op = message.pop("op")
        if op == "end":
            return
        part, _, name = op.partition(".")
        command: Callable[..., None] = getattr(parts[part], name)
        command(**message)


def _answer(pulse: socket.socket) -> None:
    """Tells the leader that this process lives, and ends it when the leader is gone, whatever else it is doing."""
    while True:
        try:
            beats = pulse.recv(4096)
            if beats:
                pulse.sendall(beats)
        except OSError:
            beats = b""
        if not beats:
            os._exit(LEADER_GONE)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
