"""Settings: who wins, what is refused and how it is said; and the command that reads them, as a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from kvferry.deploy.cli import app
from kvferry.deploy.settings import Settings
from kvferry.deploy.store_settings import disk_options
from kvferry.kvstore.ring_config import RingConfig

KVFERRY = Path(sys.executable).with_name("kvferry")


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("KVFERRY_") and name != "KVFERRY_CACHE":
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return file


def problems(error: ValidationError) -> list[str]:
    """The keys that are wrong, as the command prints them."""
    return [".".join(map(str, each["loc"])) for each in error.errors()]


# --- precedence --------------------------------------------------------------------------------------------------

YAML = """
model: from-file
block_size: 64
gateway: {port: 1111, host: file-host}
store:
  memory: 3MiB
  redis: redis://file:1/0
"""
TOML = """
model = "from-file"
block_size = 64
gateway = {port = 1111, host = "file-host"}
[store]
memory = "3MiB"
redis = "redis://file:1/0"
"""


def test_defaults() -> None:
    settings = Settings.load()
    assert settings.model == "demo"
    assert (settings.preset, settings.block_size, settings.sink_tokens, settings.dtype) == ("kv2", None, None, "auto")
    assert settings.gateway.host == settings.store.host == "127.0.0.1"
    assert (settings.store.memory, settings.decode.kv_memory) == (2**30, 2**29)
    assert settings.store.redis is None


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.yml", YAML), ("a.toml", TOML)])
def test_file_over_defaults(write: Any, name: str, text: str) -> None:
    settings = Settings.load(write(name, text))
    assert (settings.model, settings.block_size) == ("from-file", 64)
    assert (settings.gateway.port, settings.gateway.host) == (1111, "file-host")
    assert (settings.store.memory, settings.store.redis.url) == (3 * 2**20, "redis://file:1/0")
    assert settings.store.port == Settings.load().store.port  # not in the file
    assert settings.prefill == Settings.load().prefill


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.toml", TOML)])
def test_options_over_environment_over_file(write: Any, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """Also inside one section, key by key."""
    path = write(name, text)
    monkeypatch.setenv("KVFERRY_MODEL", "from-env")
    monkeypatch.setenv("KVFERRY_GATEWAY__PORT", "2222")
    monkeypatch.setenv("KVFERRY_GATEWAY__MAX_QUEUED", "7")
    monkeypatch.setenv("KVFERRY_STORE__MEMORY", "4MiB")
    settings = Settings.load(path)
    assert (settings.model, settings.block_size) == ("from-env", 64)
    assert (settings.gateway.port, settings.gateway.host, settings.gateway.max_queued) == (2222, "file-host", 7)
    assert (settings.store.memory, settings.store.redis.url) == (4 * 2**20, "redis://file:1/0")

    settings = Settings.load(path, model="from-option", gateway={"port": 3333}, block_size=None, store=None)
    assert (settings.model, settings.block_size) == ("from-option", 64)
    assert (settings.gateway.port, settings.gateway.host, settings.gateway.max_queued) == (3333, "file-host", 7)
    assert settings.store.memory == 4 * 2**20
    assert Settings.load(model="from-option").model == "from-option"


def test_an_empty_variable_and_an_empty_file_are_not_set(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_MODEL", "")
    monkeypatch.setenv("KVFERRY_STORE__MEMORY", "")
    assert Settings.load(write("a.yaml", "")) == Settings.load(write("a.toml", "")) == Settings.load()
    assert Settings.load().model == "demo"


def test_a_variable_for_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_CACHE", "/somewhere")
    assert Settings.load() == Settings.load(model="demo")


def test_the_file_does_not_stick(write: Any) -> None:
    Settings.load(write("a.yaml", YAML))
    assert Settings.load().model == "demo"


def test_sizes_are_read_from_every_source(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load(write("a.yaml", "store: {memory: 5000}")).store.memory == 5000
    assert Settings.load(decode={"kv_memory": "2KiB"}).decode.kv_memory == 2048
    assert Settings.load(decode={"kv_memory": "80%"}).decode.kv_memory == 0.8
    for wrong in ("0%", "101%", "x%", 0.5, 0, -3):
        with pytest.raises(ValidationError, match="kv_memory"):
            Settings.load(decode={"kv_memory": wrong})
    monkeypatch.setenv("KVFERRY_GATEWAY__MAX_PROMPT_BYTES", "1.5KB")
    assert Settings.load().gateway.max_prompt_bytes == 1500


# --- what is refused ---------------------------------------------------------------------------------------------

BAD = [
    ("modle: x", "modle"),
    ("store: {memroy: 1GiB}", "store.memroy"),
    ("gateway: {port: 1, nested: {deep: 1}}", "gateway.nested"),
    ("block_size: many", "block_size"),
    ("max_model_len: 1.5", "max_model_len"),
    ("max_model_len: -1", "max_model_len"),
    ("threads: -1", "threads"),
    ("model: [a]", "model"),
    ("dtype: int8", "dtype"),
    ("kernels: cuda", "kernels"),
    ("store: 5", "store"),
    ("store: [memory, 5]", "store"),
    ("gateway: {port: 65536}", "gateway.port"),
    ("gateway: {port: -1}", "gateway.port"),
    ("gateway: {max_concurrent: 0}", "gateway.max_concurrent"),
    ("gateway: {default_timeout_s: 0}", "gateway.default_timeout_s"),
    ("store: {memory: 5 apples}", "store.memory"),
    ("store: {memory: 0}", "store.memory"),
    ("store: {memory: -5}", "store.memory"),
    ("store: {memory: off}", "store"),
    ("store: {memory: off, write: back, disk: {path: /x, bytes: 1GiB}}", "store"),
    ("store: {write: around}", "store.write"),
    ("store: {count: 0}", "store.count"),
    ("store: {count: 65}", "store.count"),
    ("store: {count: 3, port: 65534}", "store"),
    ("store: {replication: 0}", "store.replication"),
    ("store: {replication: 2}", "store"),
    ("store: {count: 2, replication: 3}", "store"),
    ("store: {nodes: ['a:1'], replication: 2}", "store"),
    ("store: {nodes: ['a']}", "store"),
    ("store: {nodes: ['a:1', 'a:1']}", "store"),
    ("store: {nodes: ['a:1'], count: 2}", "store"),
    ("store: {nodes: ['a:1'], disk: {path: /x, bytes: 1GiB}}", "store"),
    ("store: {disk: {path: /x}}", "store.disk.bytes"),
    ("store: {disk: {path: /x, bytes: 0}}", "store.disk.bytes"),
    ("store: {disk: /x}", "store.disk"),
    ("store: {redis: {}}", "store.redis"),
    ("store: {redis: 'http://x'}", "store.redis"),
    ("store: {redis: {url: 'redis://x', cluster: ['x:1']}}", "store.redis"),
    ("store: {redis: {cluster: ['x']}}", "store.redis"),
    ("store: {redis: {sentinel: {nodes: ['x:1']}}}", "store.redis.sentinel.service"),
    ("store: {redis: {url: 'redis://x', tls: {ca: /x}}}", "store.redis"),
    ("store: {redis: {url: 'rediss://x', tls: {cert: /x}}}", "store.redis"),
    ("store: {redis: {url: 'redis://x', password: a, password_file: /b}}", "store.redis"),
    ("store: {redis: {url: 'redis://:a@x', password: b}}", "store.redis"),
    ("decode: {kv_memory: 1XB}", "decode.kv_memory"),
    ("decode: {max_num_seqs: 0}", "decode.max_num_seqs"),
    ("decode: {count: 0}", "decode.count"),
    ("prefill: {count: 65}", "prefill.count"),
]


@pytest.mark.parametrize(("text", "key"), BAD)
def test_a_bad_setting_is_named(write: Any, text: str, key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.load(write("a.yaml", text))
    assert problems(caught.value) == [key]


def test_a_redis_password_is_taken_from_a_variable_or_a_file_and_never_told(
    write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    path = write("a.yaml", "store: {redis: {cluster: ['127.0.0.1:1', '127.0.0.1:2'], user: app}}")
    monkeypatch.setenv("KVFERRY_STORE__REDIS__PASSWORD", "hunter2")
    settings = Settings.load(path)
    place = settings.store.store_config().redis
    assert place is not None
    assert (place.user, place.password, place.cluster) == ("app", "hunter2", ("127.0.0.1:1", "127.0.0.1:2"))
    for text in (repr(settings), str(settings), settings.model_dump_json(), repr(place), place.text):
        assert "hunter2" not in text
    monkeypatch.setenv("KVFERRY_STORE__MEMORY", "off")
    monkeypatch.setenv("KVFERRY_STORE__WRITE", "back")
    with pytest.raises(ValidationError) as caught:
        Settings.load(path)
    assert "hunter2" not in str(caught.value)
    monkeypatch.delenv("KVFERRY_STORE__WRITE")
    monkeypatch.delenv("KVFERRY_STORE__REDIS__PASSWORD")
    secret = tmp_path / "secret"
    secret.write_text("from-file\n")
    monkeypatch.setenv("KVFERRY_STORE__REDIS__PASSWORD_FILE", str(secret))
    config = Settings.load(path).store.store_config()
    assert config.redis is not None
    assert (config.redis.password, config.memory_bytes) == ("from-file", None)


def test_several_store_nodes(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Settings.load(write("a.yaml", "store: {count: 2, replication: 2, disk: {path: /d, bytes: 1GiB}}")).store
    folders = [store.store_config(index).disk for index in range(2)]
    assert [disk and str(disk.folder) for disk in folders] == ["/d/node-0", "/d/node-1"]
    assert store.ring_config(["a:1", "b:1"]) == RingConfig(nodes=("a:1", "b:1"), replication=2)
    monkeypatch.setenv("KVFERRY_STORE__NODES", '["10.0.0.1:7700", "10.0.0.2:7700"]')
    assert Settings.load().store.nodes == ["10.0.0.1:7700", "10.0.0.2:7700"]
    with pytest.raises(ValidationError, match="remove memory"):
        Settings.load(store={"memory": "1GiB"})


def test_the_disk_tier_from_the_command_line(tmp_path: Any) -> None:
    disk = disk_options(tmp_path, "20GiB")
    config = Settings.load(store={"disk": disk, "write": "back"}).store.store_config()
    assert config.disk is not None
    assert (config.disk.folder, config.disk.capacity_bytes) == (tmp_path, 20 * 2**30)
    assert config.tier_names == "memory+disk"
    assert disk_options(None, None) is None


def test_every_bad_setting_is_named(write: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.load(write("a.toml", 'modle = "x"\ndtype = "int8"\n[store]\nmemory = "5 apples"\nport = "http"\n'))
    assert sorted(problems(caught.value)) == ["dtype", "modle", "store.memory", "store.port"]


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("KVFERRY_BLOCK_SIZE", "many", "block_size"),
        ("KVFERRY_STORE__MEMORY", "1XB", "store.memory"),
        ("KVFERRY_STORE__MEMROY", "1GiB", "store.memroy"),
        ("KVFERRY_GATEWAY__PORT", "http", "gateway.port"),
    ],
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, key: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        Settings.load()
    assert problems(caught.value) == [key]


def test_a_bad_option_is_named() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.load(decode={"kv_memory": "lots"}, gateway={"port": 70000}, nonsense=1)
    assert sorted(problems(caught.value)) == ["decode.kv_memory", "gateway.port", "nonsense"]


def test_a_section_that_is_not_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_STORE", "nonsense")
    with pytest.raises(ValueError, match="store"):
        Settings.load()


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.yaml"):
        Settings.load(tmp_path / "missing.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(OSError, match=r"folder\.yaml"):
        Settings.load(tmp_path / "folder.yaml")


@pytest.mark.parametrize("name", ["a.json", "a.ini", "a", "a.yaml.bak"])
def test_another_kind_of_file(write: Any, name: str) -> None:
    with pytest.raises(ValueError, match=r"ends in \.yaml, \.yml or \.toml"):
        Settings.load(write(name, "{}"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "model = ["),
        ("a.toml", 'model = "a"\nmodel = "b"'),
        ("a.yaml", "just words"),
        ("a.yaml", "model: [demo"),
        ("a.yaml", "- 1"),
        ("a.yaml", "1: 2"),
    ],
)
def test_a_file_that_is_not_settings(write: Any, name: str, text: str) -> None:
    """`load` promises ValueError, which the command turns into a line."""
    with pytest.raises(ValueError):
        Settings.load(write(name, text))


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings.load().store.memory = 5  # type: ignore[misc]


# --- the command -------------------------------------------------------------------------------------------------


def kvferry(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KVFERRY, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "200", **environment},
        stdin=subprocess.DEVNULL,
    )


def assert_fails_kindly(done: subprocess.CompletedProcess[str], *expected: str, lines: int = 1) -> None:
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("kvferry: ")
    assert len(done.stderr.splitlines()) == lines, done.stderr
    for part in expected:
        assert part in done.stderr


def test_help_names_every_command() -> None:
    done = kvferry("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("serve", "generate", "demo"):
        assert f"  {command} " in done.stdout


def test_serve_help_names_every_option() -> None:
    done = kvferry("serve", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for option in (
        "--config",
        "--host",
        "--port",
        "--kv-memory",
        "--store-memory",
        "--store-disk",
        "--redis",
        "--max-model-len",
    ):
        assert option in done.stdout


def test_generate_without_a_gateway() -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else can listen there either
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = kvferry("generate", "Hello", "--address", address, "--timeout", "20")
    assert_fails_kindly(done, f"No gateway answers at {address}")


def test_generate_without_a_prompt(tmp_path: Path) -> None:
    assert_fails_kindly(kvferry("generate"), "give either a prompt or --prompt-file")
    missing = tmp_path / "missing.txt"
    assert_fails_kindly(kvferry("generate", "--prompt-file", str(missing)), f"cannot read {missing}")


def test_serve_with_a_bad_configuration(write: Any) -> None:
    path = write("bad.yaml", "modle: x\nstore: {memory: 5 apples}\n")
    done = kvferry("serve", "--config", str(path), "--kv-memory", "lots", KVFERRY_GATEWAY__PORT="http")
    assert_fails_kindly(done, "  modle: ", "  store.memory: ", "  decode.kv_memory: ", "  gateway.port: ", lines=5)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("missing.yaml", None, "there is no file"),
        ("bad.json", "{}", "ends in .yaml, .yml or .toml"),
        ("bad.toml", "model = [", "bad.toml"),
        ("bad.yaml", "model: [demo", "bad.yaml"),
        ("list.yaml", "- 1", "list.yaml"),
        ("words.yaml", "just words", "words.yaml"),
    ],
)
def test_serve_with_a_file_that_cannot_be_read(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, expected: str
) -> None:
    """In this process, because importing Ray in a new one takes seconds."""
    monkeypatch.setenv("KVFERRY_MODEL", str(tmp_path / "no-model"))  # whatever happens, nothing is started
    path = tmp_path / name if text is None else write(name, text)
    done = CliRunner().invoke(app, ["serve", "--config", str(path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert isinstance(done.exception, SystemExit), done.exception
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("kvferry: ") and expected in done.stderr


def test_bulk_ports() -> None:
    """They count up like the nodes' own, do not meet them, and can be off."""
    store = Settings.load(store={"count": 3}).store
    nodes = [store.node_config(index) for index in range(3)]
    assert [(node.port, node.bulk_port) for node in nodes] == [(7700, 7770), (7701, 7771), (7702, 7772)]
    assert Settings.load(store={"port": 0}).store.node_config(1).bulk_port == 0
    assert Settings.load(store={"bulk_port": "off"}).store.node_config().bulk_port is None
    assert Settings.load(store={"bulk_port": False}).store.node_config().bulk_port is None
    for wrong in ({"bulk_port": 7701, "count": 2}, {"bulk_port": 65535, "count": 2}, {"bulk_port": -1}):
        with pytest.raises(ValidationError):
            Settings.load(store=wrong)
