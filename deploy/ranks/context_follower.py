"""A follower that holds a share of every context: `python -m kvferry.deploy.ranks.context_follower COMMANDS PULSE`, two
file descriptors, started by its leader only."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from kvferry.deploy.ranks.channel import Channel, pack
from kvferry.deploy.ranks.collectives import ProcessGroup
from kvferry.deploy.ranks.context_share import ContextShare, ShareConfig
from kvferry.deploy.ranks.pulse import answer_pulse
from kvferry.kernels.dispatch import select_kernels

logger = logging.getLogger(__name__)


def main(commands_fd: int, pulse_fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the leader, too, and it says when to end
    answer_pulse(pulse_fd)
    channel = Channel(socket.socket(fileno=commands_fd))
    channel.send(pack({"op": "hello"}))
    start = channel.receive()
    if start is None or start["op"] != "start":
        return
    rank, device = start["rank"], torch.device(start["device"])
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(name)s: %(message)s")
    torch.set_num_threads(start["threads"])
    config = ShareConfig.from_message(start["config"])
    kernels = select_kernels(device, head_dim=config.layout.head_dim, impl=start["kernels"]).kernels
    if kernels.name != start["kernels_name"]:
        raise ValueError(f"this rank has the kernels {kernels.name} where its leader has {start['kernels_name']}")
    share = ContextShare(config, kernels, device)
    team = ProcessGroup(Path(start["folder"]), rank, start["size"], device)
    team.meet()
    team.all_true(True)  # the leader's sign that it may remove the folder where they met
    while (message := channel.receive()) is not None:
        op = message.pop("op")
        if op == "end":
            return
        if op == "step":
            message["exchange"] = team
        command: Callable[..., None] = getattr(share, op)
        command(**message)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
