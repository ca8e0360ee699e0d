"""`kvferry config`, and whether docs/configuration.md names every key and no other."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from kvferry.deploy.cli import app
from kvferry.deploy.cli_config import find_warnings
from kvferry.deploy.settings import Settings

WITH_FULL_NAMES = ("Model and numerics", "metrics` and `log")
"""Headings of tables whose keys are written from the top."""
DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("KVFERRY_") and name != "KVFERRY_CACHE":
            monkeypatch.delenv(name)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)


def keys_of(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Every key that takes a value, dotted."""
    keys = set()
    for name, field in model.model_fields.items():
        inner = list(_sections_in(field.annotation))
        for section in inner:
            keys |= keys_of(section, f"{prefix}{name}.")
        if not inner:
            keys.add(prefix + name)
    return keys


def documented_keys() -> set[str]:
    """First columns of the tables whose heading names a section of the settings, or the model."""
    keys: set[str] = set()
    prefix: str | None = None
    for line in DOCS.read_text().splitlines():
        if heading := re.fullmatch(r"## (.*)", line):
            section = heading[1].strip("`")
            known = section in Settings.model_fields
            prefix = f"{section}." if known else "" if section in WITH_FULL_NAMES else None
        elif prefix is not None and line.startswith("| `"):
            keys |= {prefix + key for key in re.findall(r"`([^`]+)`", line.split("|")[1])}
    return keys


def test_docs_name_every_key_and_no_other() -> None:
    shorthand = {"store.redis"}  # a string there is short for its url
    assert documented_keys() - shorthand == keys_of(Settings)


def documented_examples() -> list[str]:
    """Every YAML example of the page, and the shipped file."""
    shipped = (DOCS.parents[1] / "deploy/cluster/kvferry.yaml").read_text()
    return [*re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL), shipped]


def test_schema_and_settings_take_the_examples(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["config", "schema"])
    schema = json.loads(printed.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    examples = documented_examples()
    assert len(examples) >= 4
    for text in [*examples, "store: {memory: off, redis: 'redis://h:1'}", "decode: {kv_memory: 80%}"]:
        validator.validate(yaml.safe_load(text))
        path = tmp_path / "kvferry.yaml"
        path.write_text(text)
        Settings.load(path)
    for wrong in ({"modell": "demo"}, {"cluster": {"bind": "everywhere"}}, {"decode": {"count": 0}}):
        assert not validator.is_valid(wrong), wrong


def test_check_prints_effective_values_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kvferry.yaml"
    path.write_text("store: {memory: 2GiB, redis: {url: 'redis://10.0.0.1:1', password: hunter2}}\n")
    monkeypatch.setenv("KVFERRY_DECODE__COUNT", "3")
    result = CliRunner().invoke(app, ["config", "check", str(path)])
    assert result.exit_code == 0, result.output
    values = yaml.safe_load(result.stdout)
    assert values["store"]["memory"] == 2 * 2**30
    assert values["decode"]["count"] == 3
    assert values["gateway"]["port"] == 7600
    assert "hunter2" not in result.output
    as_json = CliRunner().invoke(app, ["config", "check", "--json", str(path)])
    assert json.loads(as_json.stdout)["settings"]["store"]["memory"] == 2 * 2**30
    assert "hunter2" not in as_json.output


@pytest.mark.parametrize(
    "text, said", [("decode: {cuont: 2}", "decode.cuont"), ("cluster: {bind: all}", "cluster.bind")]
)
def test_check_names_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "kvferry.yaml"
    path.write_text(text)
    result = CliRunner().invoke(app, ["config", "check", str(path)])
    assert result.exit_code == 1
    assert said in result.stderr


@pytest.mark.parametrize(
    "given, said",
    [
        ({"cluster": {"machines": 3}}, "cluster.bind: loopback"),
        ({"cluster": {"machines": 3, "bind": "machine"}}, "cluster.bind: machine"),
        ({"cluster": {"machines": 2, "bind": "machine"}, "store": {"count": 3}}, "store.count"),
        ({"cluster": {"machines": 2, "bind": "machine"}, "gateway": {"count": 3}}, "gateway.count"),
        ({"gateway": {"count": 2}}, "gateway.count"),
        ({"gateway": {"host": "0.0.0.0"}}, "gateway.host"),
        ({"prefill": {"count": 50}}, "overlap"),
    ],
)
def test_warnings(given: dict[str, Any], said: str) -> None:
    assert any(said in warning for warning in find_warnings(Settings.load(None, **given)))


def test_the_defaults_give_no_warning() -> None:
    assert find_warnings(Settings.load(None)) == []
