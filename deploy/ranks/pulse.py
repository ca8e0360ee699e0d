"""A follower's sign of life."""

from __future__ import annotations

import os
import socket
import threading

LEADER_GONE = 3
"""Exit status."""


def answer_pulse(fd: int) -> None:
    """Answers on a thread of its own for as long as this process lives."""
    pulse = socket.socket(fileno=fd)
    threading.Thread(target=_answer, args=(pulse,), name="pulse", daemon=True).start()


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
