"""Metrics and logs of a real deployment: every process under Ray, a Redis behind the store, real requests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from support.processes import RedisProcess

from kvferry.deploy.client_access import ClientAccess
from kvferry.deploy.operations_settings import MetricsSettings
from kvferry.deploy.settings import Settings
from kvferry.deploy.token_files import token_entry
from kvferry.kvstore.metrics_endpoint import MetricsPlace
from kvferry.proto import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from kvferry.proto.bearer import token_digest
from kvferry.proto.token_file import new_token, write_secret

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 180.0
STOP_LIMIT_S = 60.0
BLOCK_SIZE = 32
PROCESSES = ("store", "prefill-0", "decode-0", "gateway")

CANARY = "zyxcanaryprompt"
SECRET = "zyxcanarysecret"
STOP_CANARY = "zyxcanarystop"
CLUSTER_TOKEN, CLIENT_TOKEN, WRONG_TOKEN = (
    f"zyxcanary{name}token{new_token()}" for name in ("cluster", "client", "wrong")
)
ROLE_CANARY = "zyxcanaryrole"
TENANT_CANARY = "zyxcanarytenant"
MODEL_CANARY = "zyxcanarymodel"
ID_CANARY = "zyx canary id"
TOKEN_CANARY = (41017, 41019, 41023, 41029, 41031)


@dataclass
class Served:
    address: str
    metrics: dict[str, str]
    """By process: the URL of its metrics."""
    log: Path
    ray_logs: Path
    redis: RedisProcess

    def lines(self) -> list[dict[str, object]]:
        """Every JSON line that our processes logged; Ray puts a prefix before those of its actors."""
        lines = []
        for text in self.log.read_text().splitlines():
            start = text.find('{"time"')
            if start >= 0:
                lines.append(json.loads(re.sub(r"\x1b\[[0-9;]*m", "", text[start:])))
        return lines

    def address_of(self, process: str) -> str:
        """host:port of its gRPC, as its start was logged."""
        said = f"{process} is up on "
        return next(str(line["message"]).removeprefix(said) for line in self.lines() if said in str(line["message"]))

    def scrape(self, process: str, accept: str = "text/plain") -> str:
        request = urllib.request.Request(self.metrics[process], headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as reply:
            return str(reply.read().decode())

    def values(self, process: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Samples of one process by name and labels."""
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(self.scrape(process))
            for sample in family.samples
        }

    def total(self, process: str, name: str, **labels: str) -> float:
        """The sum over all samples of that name with these labels, at least one."""
        wanted = set(labels.items())
        found = [
            value
            for (sample, has), value in self.values(process).items()
            if sample == f"kvferry_{name}" and wanted <= set(has)
        ]
        assert found, f"{process} has no {name} with {labels}"
        return sum(found)


@pytest.fixture(scope="module")
def served(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`kvferry serve` at debug level, with JSON lines, on free ports."""
    folder = tmp_path_factory.mktemp("operations")
    redis = RedisProcess(folder, "--requirepass", SECRET)
    short = Path(tempfile.mkdtemp(prefix="kvops-", dir="/tmp"))  # Ray's socket paths must be short
    write_secret(folder / "cluster_token", CLUSTER_TOKEN)
    entry = token_entry("a-client", CLIENT_TOKEN, tenant=TENANT_CANARY)
    (folder / "tokens.yaml").write_text(yaml.safe_dump({"tokens": [entry]}))
    config = folder / "kvferry.yaml"
    config.write_text(
        f"model: {tiny_model('llama')}\n"
        "served_model_name: tiny\n"
        "dtype: float32\n"
        f"preset: kv16\nblock_size: {BLOCK_SIZE}\n"
        "threads: 1\n"
        "gateway: {port: 0}\n"
        f"store: {{port: 0, memory: 64MiB, redis: {{url: '{redis.url}', password: {SECRET}}}}}\n"
        "prefill: {port: 0, fetch: always}\n"
        "decode: {port: 0, kv_memory: 16MiB, publish_answers: false}\n"
        "log: {format: json, level: debug}\n"
        f"security: {{cluster_token_file: {folder}/cluster_token, tokens_file: {folder}/tokens.yaml}}\n"
    )
    log = folder / "serve.log"
    environment = dict(
        os.environ,
        PYTHONPATH=str(ROOT / "src"),
        TMPDIR=str(short),
        HOME=str(folder),
        XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
    )
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvferry.deploy.cli", "serve", "--config", str(config)],
            stdout=stream,
            stderr=stream,
            env=environment,
        )
    try:
        address = _until(process, log, lambda text: _after(text, "kvferry serves on "))
        served = Served(address, {}, log, short, redis)
        deadline = time.monotonic() + 30
        while len(served.metrics) < len(PROCESSES):
            assert time.monotonic() < deadline, log.read_text()
            for line in served.lines():
                if str(line["message"]).startswith("metrics on "):
                    served.metrics[str(line["process"])] = str(line["message"]).removeprefix("metrics on ")
            time.sleep(0.1)
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_LIMIT_S)
        redis.kill()
        shutil.rmtree(short, ignore_errors=True)


def _after(text: str, words: str) -> str | None:
    return next((line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(words)), None)


def _until(process: subprocess.Popen[bytes], log: Path, found: Callable[[str], str | None]) -> str:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        text = log.read_text()
        if (value := found(text)) is not None:
            return value
        assert process.poll() is None, text
        time.sleep(0.2)
    raise AssertionError(f"not serving after {START_LIMIT_S} s: {log.read_text()}")


def _request(text: str, *, max_tokens: int = 6, **fields: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        text=text,
        sampling=inference_pb2.Sampling(max_tokens=max_tokens, ignore_eos=True),
        **fields,  # type: ignore[arg-type]
    )


def _answer(stub: inference_pb2_grpc.InferenceStub, request: inference_pb2.GenerateRequest) -> inference_pb2.Usage:
    chunks = list(stub.Generate(request, timeout=120))
    assert chunks[-1].finish_reason
    return chunks[-1].usage


@pytest.fixture
def stub(served: Served) -> Iterator[inference_pb2_grpc.InferenceStub]:
    with ClientAccess(token=CLIENT_TOKEN).channel(served.address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def _eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, f"did not come true: {what}"
        time.sleep(0.1)


def test_every_process_counts_the_requests(served: Served, stub: inference_pb2_grpc.InferenceStub) -> None:
    assert set(served.metrics) == set(PROCESSES)
    assert all(url.startswith("http://127.0.0.1:") for url in served.metrics.values())
    names = (
        "prompt_tokens_total", "prompt_tokens_cached_total", "generation_tokens_total",
        "time_to_first_token_seconds_count", "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count", "e2e_request_latency_seconds_sum", "request_queue_time_seconds_count",
        "request_prefill_time_seconds_count", "request_decode_time_seconds_count",
    )  # fmt: skip
    before = {name: served.total("gateway", name) for name in names}
    finished_before = served.total("gateway", "request_success_total", finished_reason="length")
    puts_before = served.total("store", "store_puts_total")
    prompts_before = served.total("prefill-0", "prefill_prompt_tokens_total")
    tokens_before = served.total("decode-0", "decode_tokens_total")
    written_before = served.total("prefill-0", "kv_transfer_bytes_total", path="store_write")

    text = " ".join(f"counted{i}" for i in range(60))
    usages = [
        _answer(stub, _request(text)),
        _answer(stub, _request(text)),
        _answer(stub, _request("short", max_tokens=3)),
    ]
    assert usages[1].cached_tokens >= BLOCK_SIZE

    def gained(name: str) -> float:
        return served.total("gateway", name) - before[name]

    _eventually(lambda: gained("e2e_request_latency_seconds_count") == 3, "three requests are counted")
    assert gained("prompt_tokens_total") == sum(usage.prompt_tokens for usage in usages)
    assert gained("prompt_tokens_cached_total") == sum(usage.cached_tokens for usage in usages)
    assert gained("generation_tokens_total") == sum(usage.completion_tokens for usage in usages) == 15
    assert gained("inter_token_latency_seconds_count") == 15 - 3
    for name in names:
        if name.endswith("_seconds_count") and "inter_token" not in name:
            assert gained(name) == 3, name
    told = sum(usage.e2e_seconds for usage in usages)
    assert gained("e2e_request_latency_seconds_sum") == pytest.approx(told, rel=1e-6)
    assert served.total("gateway", "request_success_total", finished_reason="length") - finished_before == 3
    assert served.total("gateway", "num_requests_running", role="gateway") == 0
    assert served.total("gateway", "gateway_serving") == 1

    blocks = usages[0].prompt_tokens // BLOCK_SIZE
    _eventually(lambda: served.total("store", "store_puts_total") - puts_before == blocks, "one put a block")
    assert served.total("store", "store_tier_records", tier="memory") >= blocks
    assert served.total("store", "store_tier_records", tier="redis") >= blocks
    prompts = sum(usage.prompt_tokens for usage in usages)
    _eventually(
        lambda: served.total("prefill-0", "prefill_prompt_tokens_total") - prompts_before == prompts, "three prompts"
    )
    assert served.total("decode-0", "decode_tokens_total") - tokens_before == 15
    hits = served.total("prefill-0", "external_prefix_cache_hits_total")
    assert BLOCK_SIZE <= hits <= served.total("prefill-0", "external_prefix_cache_queries_total")
    assert served.total("decode-0", "prefix_cache_hits_total") >= BLOCK_SIZE, "the second request finds its blocks"
    written = served.total("prefill-0", "kv_transfer_bytes_total", path="store_write") - written_before
    assert written == served.total("prefill-0", "store_client_written_bytes_total") > 0
    assert served.total("decode-0", "kv_transfer_bytes_total", path="handoff") > 0
    assert served.total("decode-0", "kv_cache_blocks") > 0
    assert served.total("prefill-0", "store_client_breaker_open") == 0


def test_failures_are_counted_by_reason(served: Served, stub: inference_pb2_grpc.InferenceStub) -> None:
    with pytest.raises(grpc.RpcError):
        _answer(stub, _request("x", model="another"))
    _eventually(
        lambda: served.total("gateway", "request_failure_total", reason="UnknownModel") >= 1, "a refusal is counted"
    )
    before = served.total("gateway", "request_failure_total")
    call = stub.Generate(_request("to be left", max_tokens=1500), timeout=120)
    next(call)
    call.cancel()
    _eventually(lambda: served.total("gateway", "request_failure_total") == before + 1, "a request that was left")
    assert served.total("gateway", "request_failure_total", reason="Cancelled") >= 1
    _eventually(lambda: served.total("decode-0", "num_requests_running", role="decode") == 0, "decode is idle again")
    assert served.total("decode-0", "decode_failures_total") >= 1


def test_both_text_formats(served: Served) -> None:
    for process in PROCESSES:
        plain = {family.name for family in text_string_to_metric_families(served.scrape(process))}
        text = served.scrape(process, "application/openmetrics-text; version=1.0.0")
        assert {family.name for family in parse_openmetrics(text)} >= {name for name in plain if "kvferry" in name}
        assert {"process_resident_memory_bytes", "process_open_fds"} <= plain


def test_dashboard_and_alerts_ask_for_what_exists(served: Served, stub: inference_pb2_grpc.InferenceStub) -> None:
    _answer(stub, _request("something to count"))
    with pytest.raises(grpc.RpcError):
        _answer(stub, _request("x", model="another"))
    names: dict[str, set[str]] = {}
    for process in PROCESSES:
        for (name, labels), _ in served.values(process).items():
            names.setdefault(name, set()).update(key for key, _ in labels)
    asked = [*_dashboard_queries(), *_alert_queries()]
    assert len(asked) > 40
    for query in asked:
        found = re.findall(r"\b((?:kvferry|process)_\w+)(?:\{([^}]*)\})?", query)
        assert found or query.startswith("up{"), query
        for name, selector in found:
            assert name in names, f"no process has {name}, which is asked for in {query}"
            for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector):
                assert label in names[name] | {"job", "instance"}, f"{name} has no label {label}"
        for labels in re.findall(r"\bby \(([^)]*)\)", query):
            known = set.union({"instance", "job"}, *(names[name] for name, _ in found))
            assert set(re.split(r",\s*", labels)) <= known, query


def _dashboard_queries() -> list[str]:
    dashboard = json.loads((ROOT / "deploy/grafana/kvferry.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def _alert_queries() -> list[str]:
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    return [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def test_every_metric_is_documented(served: Served) -> None:
    documented = set(re.findall(r"^\| `(kvferry_\w+)`", (ROOT / "docs/operations.md").read_text(), re.MULTILINE))
    told = {
        family.name + ("_total" if family.type == "counter" else "")
        for process in PROCESSES
        for family in text_string_to_metric_families(served.scrape(process))
        if family.name.startswith("kvferry_")
    }
    assert told <= documented, told - documented
    elsewhere = {"kvferry_worker_cache_bytes", "kvferry_worker_cache_hits_total"}
    elsewhere |= {"kvferry_rank_resident_memory_bytes", "kvferry_rank_cpu_seconds_total"}
    elsewhere |= {
        name for name in documented if name.startswith("kvferry_directory_")
    }  # tests/deploy/test_directory.py
    assert documented - told == elsewhere, documented - told


def test_scrape_config_has_the_default_ports() -> None:
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in scraped}
    settings = Settings()
    ports = {
        "gateway": settings.gateway,
        "prefill": settings.prefill,
        "decode": settings.decode,
        "store": settings.store,
    }
    for role, section in ports.items():
        place = settings.metrics.place(section.port)
        assert place is not None
        assert targets[f"kvferry-{role}"] == [f"{place.host}:{place.port}"]
    assert Settings(metrics=MetricsSettings(enabled=False)).metrics.place(7600) is None
    assert settings.metrics.place(0) == MetricsPlace(port=0)


def test_labels_are_bounded(served: Served) -> None:
    allowed = {"model_name", "role", "tier", "path", "node", "reason", "outcome", "finished_reason", "le"}
    allowed |= {"roles", "kernels", "device"}
    for process in PROCESSES:
        for (name, labels), _ in served.values(process).items():
            if name.startswith("kvferry_"):
                assert {key for key, _ in labels} <= allowed, name
                assert all("default" not in value for _, value in labels), "a tenant is no label"


def test_one_request_id_in_every_process(served: Served, stub: inference_pb2_grpc.InferenceStub) -> None:
    request_id = "follow-me:1"
    usage = _answer(stub, _request(" ".join(f"followed{i}" for i in range(50)), request_id=request_id))

    def told() -> set[object]:
        return {line["process"] for line in served.lines() if line.get("request_id") == request_id}

    _eventually(lambda: told() == set(PROCESSES), f"every process names the request, not only {told()}")
    lines = [line for line in served.lines() if line.get("request_id") == request_id]
    by_store = {line["message"] for line in lines if line["process"] == "store"}
    assert "Lookup" in by_store and by_store & {"Put", "bulk put"}
    (finished,) = [line for line in lines if line["message"] == "request finished"]
    assert finished["client"] == "a-client"
    assert finished["process"] == "gateway" and finished["level"] == "info"
    assert finished["prompt_tokens"] == usage.prompt_tokens
    assert finished["completion_tokens"] == usage.completion_tokens == 6
    assert finished["e2e_s"] == round(usage.e2e_seconds, 4)
    assert finished["finish_reason"] == "length"
    assert {"queue_s", "prefill_s", "fetch_s", "transfer_s", "decode_s", "ttft_s", "failovers"} <= set(finished)
    assert str(finished["decode_worker"]).startswith("127.0.0.1:")


def test_nothing_tells_prompts_tokens_keys_or_secrets(served: Served, stub: inference_pb2_grpc.InferenceStub) -> None:
    text = " ".join(f"{CANARY}{i}" for i in range(20))
    sampling = inference_pb2.Sampling(max_tokens=4, stop=[STOP_CANARY])
    ids = inference_pb2.TokenIds(ids=TOKEN_CANARY * 10)
    chat = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role=ROLE_CANARY, content=text)])
    _answer(stub, inference_pb2.GenerateRequest(text=text, sampling=sampling, request_id="canary-text"))
    _answer(stub, inference_pb2.GenerateRequest(token_ids=ids, sampling=sampling, request_id="canary-ids"))
    told: list[str] = []
    for refused in (
        inference_pb2.GenerateRequest(chat=chat),
        inference_pb2.GenerateRequest(text=text, model=MODEL_CANARY),
        inference_pb2.GenerateRequest(text=text, request_id=ID_CANARY),
        inference_pb2.GenerateRequest(text=text, sampling=inference_pb2.Sampling(stop=[STOP_CANARY] * 17)),
        inference_pb2.GenerateRequest(text=text * 500),
        inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[*TOKEN_CANARY, 2**31])),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            _answer(stub, refused)
        error = caught.value
        assert isinstance(error, grpc.Call)
        told += [str(error.details()), *(f"{key}={value!r}" for key, value in error.trailing_metadata())]
    for token in (None, WRONG_TOKEN):
        with ClientAccess(token=token).channel(served.address) as channel, pytest.raises(grpc.RpcError) as caught:
            _answer(inference_pb2_grpc.InferenceStub(channel), inference_pb2.GenerateRequest(text=text))
        told.append(str(caught.value))
    for name in ("prefill-0", "decode-0", "store"):
        with (
            ClientAccess(token=WRONG_TOKEN).channel(served.address_of(name)) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            worker_pb2_grpc.WorkerStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=30)
        told.append(str(caught.value))
    for name in ("prefill-0", "decode-0", "store"):
        assert served.total(name, "calls_unauthenticated_total") >= 1
    for reason in ("missing", "unknown"):
        assert served.total("gateway", "gateway_calls_refused_total", reason=reason) >= 1
    served.redis.kill()  # what fails now is logged: with the password?
    _answer(stub, inference_pb2.GenerateRequest(text=f"again {text}", sampling=sampling, request_id="canary-lost"))
    _eventually(
        lambda: any("redis tier does not answer" in str(line["message"]) for line in served.lines()), "Redis is missed"
    )
    _eventually(
        lambda: any(
            line.get("request_id") == "canary-lost" and line["message"] == "request finished" for line in served.lines()
        ),
        "the last request is logged",
    )
    told += [served.scrape(process) for process in PROCESSES]
    logs = [
        served.log,
        *(path for path in served.ray_logs.rglob("*") if path.is_file() and path.suffix in (".log", ".out", ".err")),
    ]
    assert len(logs) > 4, "Ray's own logs are scanned, too"
    told += [path.read_text(errors="replace") for path in logs]
    everything = "\n".join(told)
    assert "canary-text" in everything and "canary-lost" in everything, "the scan sees the requests"
    assert "calls were refused" in everything
    canaries = (CANARY, SECRET, STOP_CANARY, ROLE_CANARY, MODEL_CANARY, ID_CANARY, TENANT_CANARY)
    for canary in (*canaries, CLUSTER_TOKEN, CLIENT_TOKEN, WRONG_TOKEN, token_digest(CLIENT_TOKEN).hex()):
        assert canary not in everything
    for token_id in TOKEN_CANARY:
        assert not re.search(rf"(?<![\d.]){token_id}(?!\d)(?=[,\]\s])", "\n".join(map(str, served.lines()))), token_id
    for line in served.lines():
        assert not re.search(r"\b[0-9a-f]{64}\b", str(line)), "a block key"
