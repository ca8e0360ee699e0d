"""`make test-cluster`: brings kvferry to life on three machines, uses it from a fourth, breaks it, and takes it down.

The machines are namespaces of this one; see lab.py. Everything else is real: `kvferry up` with
deploy/cluster/local.yaml over ssh, Ray, the demo model, gRPC. Ends non-zero when a step fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from lab import KEY, Finished, Host, Lab, LabError, why_not

from kvferry.deploy.models import find_model, load_tokenizer

ROOT = Path(__file__).parents[2]
UP_TIMEOUT_S = 900.0
ASK_TIMEOUT_S = 300.0
RECOVER_TIMEOUT_S = 240.0
DOCUMENT_TOKENS = 3000
ASK_ATTEMPTS = 3
QUESTION = "Which port does the gateway use?"


class StepFailed(Exception):
    """What the product did is not what it should do."""


class Scenario:
    def __init__(self, lab: Lab, log: Path) -> None:
        self._lab = lab
        self._log = log.open("a")
        self.times: list[tuple[str, float]] = []

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        print(f"... {title}", flush=True)
        started = time.monotonic()
        yield
        self.times.append((title, time.monotonic() - started))
        print(f"    {self.times[-1][1]:6.1f} s", flush=True)

    def kvferry(self, arguments: str, *, timeout_s: float, may_fail: bool = False) -> Finished:
        """A command of the operator, on the client's host."""
        done = self._lab.run(self._lab.client, f"kvferry {arguments}", timeout_s=timeout_s, log=self._log)
        if done.returncode and not may_fail:
            raise StepFailed(f"kvferry {arguments}: {done.output[-1500:]}{done.errors[-1500:]}")
        return done

    def status(self) -> dict[str, Any]:
        done = self.kvferry("status cluster.yaml --json", timeout_s=90, may_fail=True)
        if not done.output.startswith("{"):
            raise StepFailed(f"no status: {done.output}{done.errors}")
        status: dict[str, Any] = json.loads(done.output)
        return status

    def process(self, name: str) -> dict[str, Any]:
        return next(p for p in self.status()["processes"] if p["name"] == name)

    def ask(self, gateway: str, question: str = QUESTION) -> tuple[list[int], dict[str, Any], str]:
        """Token ids, usage and text of an answer about the document."""
        command = (
            f"generate --address {gateway} --prompt-file document.txt --question '{question}' --max-tokens 24 --json"
        )
        for attempt in range(ASK_ATTEMPTS):
            done = self.kvferry(command, timeout_s=ASK_TIMEOUT_S, may_fail=attempt + 1 < ASK_ATTEMPTS)
            if done.returncode == 0:
                break
            # The client gives a connection up that is silent for some seconds: an overloaded machine may be.
            print(f"    asked again (load average {os.getloadavg()[0]:.0f}): {done.errors.strip()}", flush=True)
        answer = json.loads(done.output)
        return answer["token_ids"], answer["usage"], answer["text"]

    def until(self, what: str, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise StepFailed(f"not within {timeout_s:g} s: {what}")
            time.sleep(2)

    def run(self) -> list[int]:
        """From `kvferry up` to `kvferry down`. Returns the answer's tokens."""
        lab = self._lab
        hosts = [host for host in lab.hosts.values() if host is not lab.client]
        with self.step("kvferry up: Ray on three machines over ssh, model loaded, serving"):
            self.kvferry("up cluster.yaml --config kvferry.yaml", timeout_s=UP_TIMEOUT_S)
        status = self.status()
        print(self.kvferry("status cluster.yaml", timeout_s=90).output)
        check(status["well"], f"not every process is well: {status}")
        machines = {p["machine"] for p in status["processes"] if p["role"] in ("prefill", "decode")}
        check(len(machines) == 3, f"the workers are on {machines}, not on three machines")
        stores = {p["machine"] for p in status["processes"] if p["role"] == "store"}
        check(len(stores) == 3, f"the store nodes are on {stores}, not on three machines")
        gateway = next(p["address"] for p in status["processes"] if p["role"] == "gateway")

        with self.step(f"first request from the fourth host, {DOCUMENT_TOKENS}-token document"):
            tokens, usage, text = self.ask(gateway)
        print(f"    {text.strip()!r}; TTFT {usage['ttft_seconds']:.1f} s, {usage['cached_tokens']} tokens cached")
        check(usage["cached_tokens"] == 0, "the first request found blocks that nobody computed")
        first = self._with_blocks()
        check(len(first) == 1, f"one decode worker should have blocks now, not {first}")

        with self.step("the same question, other decode worker"):
            again, usage, _ = self.ask(gateway)
        cached = f"{usage['cached_tokens']} of {usage['prompt_tokens']} tokens cached"
        print(f"    TTFT {usage['ttft_seconds']:.1f} s, {cached}")
        check(again == tokens, f"a hit changed the answer: {tokens} -> {again}")
        check(usage["cached_tokens"] >= DOCUMENT_TOKENS // 128 * 128, "the prefix was not found")
        check(len(self._with_blocks()) == 2, "the second answer did not come from the other decode worker")

        victim = self.process("decode-0")
        host = next(h for h in hosts if h.address == victim["machine"])
        with self.step("kill -9 of decode-0's process: a request meanwhile, and back up"):
            lab.kill(host, victim["pid"])
            meanwhile, _, _ = self.ask(gateway)
            check(meanwhile == tokens, "the answer of the other worker differs")
            self.until(
                "decode-0 is up again",
                lambda: (p := self.process("decode-0"))["pid"] not in (0, victim["pid"]) and p["health"] == "SERVING",
                RECOVER_TIMEOUT_S,
            )
        with self.step("two more requests: both decode workers serve"):
            for _ in range(2):
                again, _, _ = self.ask(gateway)
                check(again == tokens, "an answer changed after the restart")
            check(len(self._with_blocks()) == 2, "the worker that came back took no request")

        with self.step("kill -9 of the controller: it finds all processes again"):
            before = {p["name"]: p["pid"] for p in self.status()["processes"]}
            self._kill_controller(hosts)
            self.until("the controller is back", lambda: self.is_well(), RECOVER_TIMEOUT_S)
            check(before == {p["name"]: p["pid"] for p in self.status()["processes"]}, "processes were started anew")

        with self.step("kvferry scale --decode 3: a third decode worker takes requests"):
            self.kvferry("scale cluster.yaml --decode 3", timeout_s=120)
            self.until("decode-2 serves", lambda: self.is_well() and bool(self.process("decode-2")), RECOVER_TIMEOUT_S)
            self.until("decode-2 takes a request", lambda: self._served_by(gateway, "decode-2", tokens), 60)
        with self.step("kvferry scale --decode 2: it leaves"):
            self.kvferry("scale cluster.yaml --decode 2", timeout_s=120)
            self.until("decode-2 is gone", lambda: len(self.status()["processes"]) == 8, 60)
            again, _, _ = self.ask(gateway)
            check(again == tokens, "an answer changed after a worker left")

        with self.step("kvferry logs"):
            logs = self.kvferry("logs --cluster cluster.yaml decode-0 --lines 20", timeout_s=120).output
        check("kernels" in logs or "blocks" in logs, f"no log lines of decode-0: {logs!r}")

        with self.step("kvferry down"):
            self.kvferry("down cluster.yaml", timeout_s=240)
        self.check_nothing_is_left()
        return tokens

    def run_plain(self, tokens: list[int]) -> None:
        """The same with Ray's own command, and a machine that is lost. `tokens`: the answer; empty: not known yet."""
        lab = self._lab
        with self.step("plain ray up with the documented variable, until every process is well"):
            token = "ray get-auth-token --generate > /dev/null"
            command = f"{token}; RAY_UP_enable_autoscaler_v2=0 ray up -y --no-config-cache cluster.yaml"
            done = lab.run(lab.client, command, timeout_s=UP_TIMEOUT_S, log=self._log)
            check(done.returncode == 0, f"ray up failed: {done.output[-1500:]}{done.errors[-1500:]}")
            self.until("all is well", self.is_well, UP_TIMEOUT_S)
        status = self.status()
        gateway = next(p for p in status["processes"] if p["role"] == "gateway")
        with self.step("a request"):
            again, _, _ = self.ask(gateway["address"])
            check(again == tokens or not tokens, "another start of the cluster gives another answer")
            tokens = again
        lost = next(
            h
            for h in lab.hosts.values()
            if h.name != "head" and h.address not in ("", gateway["machine"], lab.client.address)
        )
        moved = [
            p["name"]
            for p in status["processes"]
            if p["machine"] == lost.address and p["role"] in ("prefill", "decode")
        ]
        with self.step(f"a machine is lost, with {' and '.join(moved)}: a request at once, and its workers elsewhere"):
            lab.switch_off(lost)
            started = time.monotonic()
            again, _, _ = self.ask(gateway["address"])
            print(f"    answered after {time.monotonic() - started:.1f} s")
            check(again == tokens, "the loss of a machine changed an answer")
            self.until(
                f"{moved} run elsewhere",
                lambda: all(
                    (p := self.process(n))["health"] == "SERVING" and p["machine"] != lost.address for n in moved
                ),
                RECOVER_TIMEOUT_S,
            )
        with self.step("kvferry down, one machine unreachable"):
            done = self.kvferry("down cluster.yaml", timeout_s=240, may_fail=True)
        check(done.returncode == 1 and lost.address in done.errors, f"the lost machine is not named: {done.errors}")
        self.check_nothing_is_left()

    def check_nothing_is_left(self) -> None:
        left = {host.name: processes for host in self._lab.hosts.values() if (processes := host.processes())}
        check(not left, f"processes were left behind: {left}")
        print("    no process is left on any host")

    def is_well(self) -> bool:
        try:
            return bool(self.status()["well"])
        except StepFailed:  # no controller, at the moment
            return False

    def _served_by(self, gateway: str, name: str, tokens: list[int]) -> bool:
        again, _, _ = self.ask(gateway)
        check(again == tokens, "another worker gives another answer")
        return name in self._with_blocks()

    def _kill_controller(self, hosts: list[Host]) -> None:
        for host in hosts:
            for pid, line in host.processes().items():
                if line.startswith("ray::Controller"):
                    os.kill(pid, signal.SIGKILL)
                    return
        raise StepFailed("no controller runs")

    def _with_blocks(self) -> set[str]:
        """Decode workers that keep blocks of finished prompts."""
        return {
            p["name"]
            for p in self.status()["processes"]
            if p["role"] == "decode" and p["numbers"].get("pool_blocks_cached")
        }


def check(condition: bool, message: str) -> None:
    if not condition:
        raise StepFailed(message)


def write_files(host: Host, names: list[str], addresses: list[str]) -> None:
    """What the operator has at hand: the shipped files, with the lab's addresses, and the document."""
    home = host.root / "root"
    cluster = yaml.safe_load((ROOT / "deploy/cluster/local.yaml").read_text())
    cluster["provider"] |= {"head_ip": addresses[0], "worker_ips": addresses[1:]}
    cluster["auth"] = {"ssh_user": "root", "ssh_private_key": f"~/{KEY}"}
    # kvferry is there already: the hosts share this machine's files, and have no way to a package index.
    cluster["setup_commands"] = ["kvferry --help > /dev/null"]
    (home / "cluster.yaml").write_text(yaml.safe_dump(cluster, sort_keys=False))
    settings = yaml.safe_load((ROOT / "deploy/cluster/kvferry.yaml").read_text())
    settings["threads"] = 1
    settings["gateway"]["router"] = "round-robin"  # so that a repeated question goes to another worker
    settings["store"]["memory"] = "256MiB"
    settings["decode"]["kv_memory"] = "128MiB"
    (home / "kvferry.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    tokenizer = load_tokenizer(find_model("demo"))
    ids = tokenizer((ROOT / "deploy/handbook.md").read_text())["input_ids"][:DOCUMENT_TOKENS]
    (home / "document.txt").write_text(tokenizer.decode(ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, default=Path("/tmp/kvferry-test-cluster.log"))
    parser.add_argument(
        "--part", choices=["all", "up", "plain"], default="all", help="kvferry up, plain ray up, or both"
    )
    arguments = parser.parse_args()
    if problem := why_not():
        print(f"test-cluster is skipped: {problem}")
        raise SystemExit(2)
    cache = Path(os.environ.get("KVFERRY_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    find_model("demo")  # converts it once, for all hosts
    arguments.log.write_text("")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the lab is taken down
    env = {"PYTHONPATH": f"{ROOT}/src", "KVFERRY_CACHE": str(cache), "RAY_USAGE_STATS_ENABLED": "0"}
    visible = [ROOT, Path(sys.prefix), Path(sys.base_prefix), cache / "kvferry"]
    started = time.monotonic()
    try:
        with Lab(["head", "worker-1", "worker-2"], path=[Path(sys.prefix) / "bin"], env=env, visible=visible) as lab:
            machines = [host for host in lab.hosts.values() if host is not lab.client]
            write_files(lab.client, [h.name for h in machines], [h.address for h in machines])
            scenario = Scenario(lab, arguments.log)
            try:
                tokens = scenario.run() if arguments.part != "plain" else []
                if arguments.part != "up":
                    scenario.run_plain(tokens)
            except BaseException:
                save_logs(lab, arguments.log)
                raise
    except (StepFailed, LabError, TimeoutError) as error:
        print(f"test-cluster FAILED: {error}\nlog: {arguments.log}", file=sys.stderr)
        raise SystemExit(1) from None
    for title, seconds in scenario.times:
        print(f"{seconds:7.1f} s  {title}")
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"test-cluster passed in {time.monotonic() - started:.0f} s; load average {load}; log: {arguments.log}")


def save_logs(lab: Lab, log: Path) -> None:
    """The ends of Ray's logs of every host, before they are gone."""
    with log.open("a") as file:
        for host in lab.hosts.values():
            for path in sorted((host.root / "tmp" / "ray").glob("session_2*/logs/*")):
                if path.is_file() and path.suffix in (".err", ".out", ".log") and path.stat().st_size:
                    file.write(f"\n==> {host.name} {path.name} <==\n{path.read_text(errors='replace')[-6000:]}\n")


if __name__ == "__main__":
    main()
