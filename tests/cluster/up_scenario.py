"""A cluster as an operator sees it: brought up, asked, broken, scaled and taken down, also by plain Ray."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from scenario import RECOVER_TIMEOUT_S, UP_TIMEOUT_S, Scenario, check

ASK_TIMEOUT_S = 300.0
DOCUMENT_TOKENS = 3000
ASK_ATTEMPTS = 3
CLIENT_TOKEN = "~/.kvferry/client_token"
QUESTION = "Which port does the gateway use?"


class UpScenario(Scenario):
    """Brought up, used, broken in the ways that one sees, scaled, and taken down."""

    def ask(self, gateway: str, question: str = QUESTION) -> tuple[list[int], dict[str, Any], str]:
        """Token ids, usage and text of an answer about the document."""
        command = (
            f"generate --address {gateway} --token-file {CLIENT_TOKEN} --prompt-file document.txt "
            f"--question '{question}' --max-tokens 24 --json"
        )
        for attempt in range(ASK_ATTEMPTS):
            done = self.kvferry(command, timeout_s=ASK_TIMEOUT_S, may_fail=attempt + 1 < ASK_ATTEMPTS)
            if done.returncode == 0:
                break
            # The client gives a connection up that is silent for some seconds: an overloaded machine may be.
            print(f"    asked again (load average {os.getloadavg()[0]:.0f}): {done.errors.strip()}", flush=True)
        answer = json.loads(done.output)
        return answer["token_ids"], answer["usage"], answer["text"]

    def run(self) -> None:
        """From `kvferry up` to `kvferry down`."""
        lab = self.lab
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

        with self.step("strangers are refused: a client at the gateway, a member at the directory"):
            head = next(p["address"] for p in status["processes"] if p["role"] == "directory")
            for command in (f"generate --address {gateway} Hello", f"members --directory {head}"):
                done = self.kvferry(command, timeout_s=60, may_fail=True)
                check(done.returncode == 1 and "token" in done.errors, f"{command}: {done.output}{done.errors}")
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
            self.kill_controller()
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

    def run_plain(self) -> None:
        """With Ray's own command, and a machine that is lost."""
        lab = self.lab
        with self.step("plain ray up with the documented variable, until every process is well"):
            token = "ray get-auth-token --generate > /dev/null; kvferry token setup"
            command = f"{token}; RAY_UP_enable_autoscaler_v2=0 ray up -y --no-config-cache cluster.yaml"
            done = lab.run(lab.client, command, timeout_s=UP_TIMEOUT_S, log=self._log)
            check(done.returncode == 0, f"ray up failed: {done.output[-1500:]}{done.errors[-1500:]}")
            self.until("all is well", self.is_well, UP_TIMEOUT_S)
        status = self.status()
        gateway = next(p for p in status["processes"] if p["role"] == "gateway")
        with self.step("a request"):
            tokens, _, _ = self.ask(gateway["address"])
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

    def _served_by(self, gateway: str, name: str, tokens: list[int]) -> bool:
        again, _, _ = self.ask(gateway)
        check(again == tokens, "another worker gives another answer")
        return name in self._with_blocks()

    def _with_blocks(self) -> set[str]:
        """Decode workers that keep blocks of finished prompts."""
        return {
            p["name"]
            for p in self.status()["processes"]
            if p["role"] == "decode" and p["numbers"].get("pool_blocks_cached")
        }
