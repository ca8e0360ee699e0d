"""Forks `kvferry` processes that have imported everything already: `python -m support.forge`.

Loading PyTorch takes seconds a process, which would be most of the time of a test with many restarts. A fork runs the
same command line in a process of its own. Reads {"args": [...], "log": path} from standard input, one a line; writes
"started PID" for each, and "ended PID CODE" when a process has ended.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import kvferry.deploy.processes
import kvferry.deploy.store_process
from kvferry.deploy.cli import main

LOADED = (transformers, AutoConfig, AutoModelForCausalLM, AutoTokenizer, kvferry.deploy.processes)


def start(args: list[str], log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    with open(log, "ab") as stream, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    code = 1
    try:
        sys.argv = ["kvferry", *args]
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        tell(f"ended {pid} {os.waitstatus_to_exitcode(status)}")


def serve() -> None:
    tell("ready")
    pending = b""
    while True:
        reap()
        readable, _, _ = select.select([0], [], [], 0.05)
        if not readable:
            continue
        data = os.read(0, 65536)
        if not data:
            return
        pending += data
        *lines, pending = pending.split(b"\n")
        for line in lines:
            order = json.loads(line)
            tell(f"started {start(order['args'], order['log'])}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve()
