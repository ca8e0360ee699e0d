"""`make test-cluster`: brings kvferry to life on three machines, uses it from a fourth, breaks it, and takes it down.

The machines are namespaces of this one; see lab.py. Everything else is real: `kvferry up` with
deploy/cluster/local.yaml over ssh, Ray, a model, gRPC. Ends non-zero when a step fails.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # for support; this folder is there already

import autoscale_scenario
from autoscale_scenario import AutoscaleScenario
from fault_scenario import FaultScenario
from lab import KEY, Host, Lab, LabError, why_not
from scenario import Scenario, StepFailed
from tiny_settings import write_tiny_settings
from up_scenario import DOCUMENT_TOKENS, UpScenario

from kvferry.deploy.models import find_model, load_tokenizer

ROOT = Path(__file__).parents[2]
HOSTS = ("head", "worker-1", "worker-2")
PARTS = {
    "up": "kvferry up, used and broken as an operator sees it",
    "plain": "plain ray up, and a machine switched off",
    "faults": "kills, stops, a rolling restart and a lost machine while clients ask",
    "autoscale": "load brings a decode worker, and it leaves again",
    "all": "these, one after the other",
}


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
    meanings = "; ".join(f"{part}: {meaning}" for part, meaning in PARTS.items())
    parser.add_argument("--part", choices=list(PARTS), default="all", help=meanings)
    arguments = parser.parse_args()
    if problem := why_not():
        print(f"test-cluster is skipped: {problem}")
        raise SystemExit(2)
    cache = Path(os.environ.get("KVFERRY_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    find_model("demo")  # converts it once, for all hosts
    arguments.log.write_text("")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the lab is taken down
    env = {
        "PYTHONPATH": f"{ROOT}/src",
        "KVFERRY_CACHE": str(cache),
        "RAY_USAGE_STATS_ENABLED": "0",
        # The hosts share one memory: when something else fills it, every host's Ray would kill what it runs.
        "RAY_memory_monitor_refresh_ms": "0",
    }
    visible = [ROOT, Path(sys.prefix), Path(sys.base_prefix), cache / "kvferry"]
    parts = [part for part in PARTS if part != "all"] if arguments.part == "all" else [arguments.part]
    started = time.monotonic()
    times: list[tuple[str, float]] = []
    try:
        for part in parts:
            with Lab(list(HOSTS), path=[Path(sys.prefix) / "bin"], env=env, visible=visible) as lab:
                machines = [host for host in lab.hosts.values() if host is not lab.client]
                write_files(lab.client, [h.name for h in machines], [h.address for h in machines])
                try:
                    times += run_part(part, lab, arguments.log).times
                except BaseException:
                    save_logs(lab, arguments.log)
                    raise
    except (StepFailed, LabError, TimeoutError, AssertionError) as error:
        print(f"test-cluster FAILED: {type(error).__name__} {error}\nlog: {arguments.log}", file=sys.stderr)
        raise SystemExit(1) from None
    for title, seconds in times:
        print(f"{seconds:7.1f} s  {title}")
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"test-cluster passed in {time.monotonic() - started:.0f} s; load average {load}; log: {arguments.log}")


def run_part(part: str, lab: Lab, log: Path) -> Scenario:
    if part in ("up", "plain"):
        operator = UpScenario(lab, log)
        operator.run() if part == "up" else operator.run_plain()
        return operator
    sections = autoscale_scenario.SECTIONS if part == "autoscale" else {}
    write_tiny_settings(lab.client.root / "root", lab.folder / "model", **sections)
    lab.join_network(lab.client)  # the clients are there
    scenario = AutoscaleScenario(lab, log) if part == "autoscale" else FaultScenario(lab, log)
    scenario.run()
    return scenario


def save_logs(lab: Lab, log: Path) -> None:
    """The ends of Ray's logs of every host, before they are gone."""
    with log.open("a") as file:
        for host in lab.hosts.values():
            for path in sorted((host.root / "tmp" / "ray").glob("session_2*/logs/*")):
                if path.is_file() and path.suffix in (".err", ".out", ".log") and path.stat().st_size:
                    file.write(f"\n==> {host.name} {path.name} <==\n{path.read_text(errors='replace')[-6000:]}\n")


if __name__ == "__main__":
    main()
