"""`kvferry doctor --config`: what it finds of a deployment's settings, against a real Redis, ports and file systems."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from typer.testing import CliRunner

from kvferry.deploy.app import model_config
from kvferry.deploy.cli import app
from kvferry.deploy.doctor import machine
from kvferry.deploy.doctor.deep import deep_findings
from kvferry.deploy.doctor.disk import check_folder
from kvferry.deploy.doctor.examination import examine
from kvferry.deploy.doctor.finding import Finding
from kvferry.deploy.doctor.limits import cgroup_limit, planned_bytes
from kvferry.deploy.doctor.ports import wanted_ports
from kvferry.deploy.kv_memory import plan_kv_memory
from kvferry.deploy.settings import Settings
from kvferry.deploy.worker_server import ModelRuntime

SECRET = "zyxcanarysecret"


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LINEARS", ((64, 32),))


@pytest.fixture
def diagnose(tmp_path: Path) -> Callable[..., list[Finding]]:
    """The findings whose topic begins with `topic`, for settings on free ports."""

    def run(topic: str, **settings: Any) -> list[Finding]:
        free: dict[str, Any] = {name: {"port": 0} for name in ("gateway", "prefill", "decode", "store")}
        for name, section in settings.items():
            free[name] = {**free.get(name, {}), **section} if isinstance(section, dict) else section
        config = tmp_path / "kvferry.yaml"
        config.write_text(yaml.safe_dump(free))
        return [finding for finding in examine(config) if finding.topic.startswith(topic)]

    return run


def by_value(findings: list[Finding], words: str) -> Finding:
    (finding,) = [finding for finding in findings if words in finding.value]
    return finding


def test_a_redis_that_refuses_when_full(start_redis: Callable[..., Any], diagnose: Callable[..., Any]) -> None:
    server = start_redis("--maxmemory", "100mb", "--maxmemory-policy", "noeviction")
    findings = diagnose("Redis 127.0.0.1", store={"redis": server.url})
    assert findings[0].status == "ok"
    bad = by_value(findings, "noeviction")
    assert bad.status == "warning" and "maxmemory-policy allkeys-lru" in bad.reason
    with redis.Redis(port=server.port) as admin:
        admin.config_set("maxmemory-policy", "allkeys-lru")
    good = by_value(diagnose("Redis 127.0.0.1", store={"redis": server.url}), "allkeys-lru")
    assert good.status == "ok" and good.value == "maxmemory 100 MiB, allkeys-lru"


def test_a_redis_without_a_limit(start_redis: Callable[..., Any], diagnose: Callable[..., Any]) -> None:
    findings = diagnose("Redis 127.0.0.1", store={"redis": start_redis().url})
    assert by_value(findings, "no maxmemory").status == "warning"


def test_a_redis_with_a_password(start_redis: Callable[..., Any], diagnose: Callable[..., Any], tmp_path: Path) -> None:
    server = start_redis("--requirepass", SECRET)
    for password in (None, f"wrong{SECRET}"):
        (refused,) = diagnose("Redis 127.0.0.1", store={"redis": {"url": server.url, "password": password}})
        assert refused.status == "problem" and "password" in refused.reason
        assert SECRET not in str(refused)
    findings = diagnose("Redis 127.0.0.1", store={"redis": {"url": server.url, "password": SECRET}})
    assert len(findings) == 2 and all(finding.status != "problem" for finding in findings)
    (unread,) = diagnose("Redis", store={"redis": {"url": server.url, "password_file": str(tmp_path / "no")}})[1:]
    assert unread.status == "problem" and "password_file" in unread.reason


def test_a_replica_and_a_user_without_rights(start_redis: Callable[..., Any], diagnose: Callable[..., Any]) -> None:
    server = start_redis("--replicaof", "127.0.0.1 1")
    assert by_value(diagnose("Redis 127.0.0.1", store={"redis": server.url}), "a replica").status == "problem"
    with redis.Redis(port=server.port) as admin:
        admin.acl_setuser("app", enabled=True, passwords=[f"+{SECRET}"], keys=["*"], commands=["+get"])
    user = {"url": server.url, "user": "app", "password": SECRET}
    (blind,) = diagnose("Redis 127.0.0.1", store={"redis": user})
    assert blind.status == "warning" and "+info" in blind.reason


def test_a_redis_that_is_not_there(diagnose: Callable[..., Any], free_port: int) -> None:
    (finding,) = diagnose("Redis 127.0.0.1", store={"redis": f"redis://:{SECRET}@127.0.0.1:{free_port}/0"})
    assert finding.status == "problem" and "not reachable" in finding.value
    assert SECRET not in str(finding)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def taken_port() -> Iterator[int]:
    """Listened on by another process, whose name has nothing of ours."""
    program = (
        "import socket, time\ns = socket.create_server(('127.0.0.1', 0))\n"
        "print(s.getsockname()[1], flush=True)\ntime.sleep(300)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_a_taken_port_names_its_holder(diagnose: Callable[..., Any], taken_port: int) -> None:
    (finding,) = diagnose(f"port {taken_port}", gateway={"port": taken_port}, metrics={"enabled": False})
    assert finding.status == "problem" and "gateway.port" in finding.reason
    assert "taken by process" in finding.value and "python" in finding.value
    assert "socket.create_server" not in finding.value, "arguments may hold secrets"


def test_our_own_port_is_a_warning(diagnose: Callable[..., Any], start_node: Callable[..., Any]) -> None:
    port = int(start_node().address.rsplit(":", 1)[1])
    (finding,) = diagnose(f"port {port}", store={"port": port}, metrics={"enabled": False})
    assert finding.status == "warning" and "kvferry runs here already" in finding.reason


def test_a_port_that_metrics_want(diagnose: Callable[..., Any], taken_port: int) -> None:
    (finding,) = diagnose(f"port {taken_port}", gateway={"port": taken_port - 100}, metrics={"port_offset": 100})
    assert finding.status == "problem" and "metrics.port_offset" in finding.reason


def test_an_address_of_another_machine(diagnose: Callable[..., Any], free_port: int) -> None:
    section = {"host": "192.0.2.1", "port": free_port}
    (finding,) = diagnose(f"port {free_port}", gateway=section, metrics={"enabled": False})
    assert finding.status == "problem" and "no address of this machine" in finding.reason


def test_ports_of_two_sections(diagnose: Callable[..., Any], free_port: int) -> None:
    same = {"port": free_port}
    (finding,) = diagnose(f"port {free_port}", gateway=same, decode=same, metrics={"enabled": False})
    assert finding.status == "problem" and "wanted twice" in finding.value


def test_every_port_of_the_defaults_is_examined() -> None:
    ports = [one.port for one in wanted_ports(Settings())]
    assert ports == [7600, 7610, 7650, 7700, 8600, 8610, 8650, 8700]
    elsewhere = Settings(store={"nodes": ["10.0.0.1:7700"]}, prefill={"count": 0})  # type: ignore[arg-type]
    assert [one.port for one in wanted_ports(elsewhere)] == [7600, 7650, 8600, 8650]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "kvferry-doctor", str(folder)], check=False)
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_and_a_full_one(small_disk: Path, diagnose: Callable[..., Any]) -> None:
    def find(num_bytes: str) -> Finding:
        (finding,) = diagnose("disk tier", store={"disk": {"path": str(small_disk), "bytes": num_bytes}})
        return finding

    assert find("70MiB").status == "warning" and "memory" in find("70MiB").reason, "tmpfs is no disk"
    larger = find("1GiB")
    assert larger.status == "warning" and "store.disk.bytes" in larger.reason
    (small_disk / "other").write_bytes(b"\0" * (40 << 20))
    full = find("1GiB")
    assert full.status == "problem" and "it is full" in full.reason
    shutil.rmtree(small_disk, ignore_errors=True)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    (finding,) = check_folder(file / "below", 1 << 20)
    assert finding.status == "problem" and "no folder" in finding.value
    if os.geteuid() == 0:
        (finding,) = check_folder(Path("/proc/kvferry"), 1 << 20)
        assert finding.status == "problem", finding


def test_a_folder_is_examined_without_a_trace(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    (before,) = check_folder(folder, 1 << 20)
    assert before.status == "ok" and not folder.exists()
    folder.mkdir()
    (after,) = check_folder(folder, 1 << 20)
    assert after.status == "ok" and list(folder.iterdir()) == []


def test_a_model_that_is_missing_or_incomplete(
    diagnose: Callable[..., Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    (missing,) = diagnose("model", model=str(tmp_path / "nowhere"))
    assert missing.status == "problem" and "not found" in missing.value
    assert diagnose("model", model=str(tmp_path / "no.gguf"))[0].status == "problem"
    whole = tiny_model("llama")
    (good,) = diagnose("model", model=str(whole))
    assert good.status == "ok" and good.value.startswith("llama, ")
    part = tmp_path / "part"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("*.safetensors"))
    (incomplete,) = diagnose("model", model=str(part))
    assert incomplete.status == "problem" and "safetensors" in incomplete.value
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    (other,) = diagnose("model", model=str(part))
    assert other.status == "problem" and "gpt2" in other.reason
    (part / "config.json").write_text("{")
    (broken,) = diagnose("model", model=str(part))
    assert broken.status == "problem" and "config.json" in broken.value


def test_the_capacity_is_the_workers(diagnose: Callable[..., Any], tiny_model: Callable[[str], Path]) -> None:
    model = str(tiny_model("llama"))
    (told,) = diagnose("KV capacity", model=model, decode={"kv_memory": "16MiB"})
    settings = Settings(model=model, device="cpu")
    (loaded, *_) = deep_findings(settings)
    assert loaded.status == "ok"
    runtime = ModelRuntime(model_config(settings))
    plan = plan_kv_memory(
        16 << 20, runtime.layout, runtime.loaded.device, windows=runtime.windows, num_slots=16, max_model_len=2048
    )
    runtime.close()
    assert told.value.startswith(f"{plan.num_blocks * runtime.layout.block_size:,} tokens in 16 MiB")
    (small,) = diagnose("KV capacity", model=model, decode={"kv_memory": "300KiB"})
    assert small.status == "warning" and "decode.kv_memory" in small.reason
    (none,) = diagnose("KV capacity", model=model, decode={"kv_memory": "3KiB"})
    assert none.status == "problem"


def test_more_memory_than_there_is(diagnose: Callable[..., Any]) -> None:
    (finding,) = diagnose("memory", store={"memory": "9000GiB"})
    assert finding.status == "problem" and "store.memory" in finding.reason
    assert planned_bytes(Settings()) == 2**30 + 512 * 2**20


def test_limits_of_a_control_group(tmp_path: Path) -> None:
    assert cgroup_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert cgroup_limit(tmp_path) == 600


def test_few_open_files() -> None:
    command = ["bash", "-c", f"ulimit -Sn 1000; exec {sys.executable} -m kvferry.deploy.cli doctor --json"]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    (finding,) = [f for f in json.loads(done.stdout)["findings"] if f["topic"] == "open files"]
    assert finding["status"] == "warning" and "ulimit -n" in finding["reason"]


def test_settings_that_are_not_valid(tmp_path: Path) -> None:
    config = tmp_path / "kvferry.yaml"
    config.write_text(f"gateway: {{prot: 1}}\nstore: {{redis: {{url: 'redis://x', password: [{SECRET}]}}}}\n")
    result = CliRunner().invoke(app, ["doctor", "--json", "--config", str(config)])
    assert result.exit_code == 1
    problems = [finding for finding in json.loads(result.output)["findings"] if finding["status"] == "problem"]
    assert "gateway.prot" in {finding["value"] for finding in problems}
    assert SECRET not in result.output
    absent = CliRunner().invoke(app, ["doctor", "--config", str(tmp_path / "no.yaml")])
    assert absent.exit_code == 1 and "problem" in absent.output
