"""What a cluster that says nothing about security gets: tokens, made once and put where they are looked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kvferry.deploy.cli_config import find_warnings
from kvferry.deploy.client_tokens import ClientTokens
from kvferry.deploy.cluster.description import ClusterDescription, read_description
from kvferry.deploy.cluster.launcher import mounted_config, token_mounts
from kvferry.deploy.security import peer_security, require_files
from kvferry.deploy.security_settings import CLUSTER_TOKEN_FILE, TOKENS_FILE
from kvferry.deploy.settings import Settings
from kvferry.deploy.token_files import make_missing_files
from kvferry.proto.token_file import read_tokens

SHIPPED = Path(__file__).parents[3] / "deploy" / "cluster"
MACHINE = {"cluster": {"bind": "machine"}}
TLS = {"cert": "a", "key": "b", "ca": "c"}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def description(tmp_path: Path, **mounts: str) -> ClusterDescription:
    raw = yaml.safe_load((SHIPPED / "local.yaml").read_text())
    raw["file_mounts"] = mounts
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(raw))
    return read_description(path)


def test_processes_on_machines_have_tokens_where_no_others_are_named() -> None:
    def files(**given: Any) -> tuple[Path | None, Path | None]:
        security = Settings.load(None, **given).security
        return security.cluster_token_file, security.tokens_file

    assert files() == (None, None)
    assert files(**MACHINE) == (CLUSTER_TOKEN_FILE, TOKENS_FILE)
    assert files(**MACHINE, security={"tokens_file": "x"}) == (CLUSTER_TOKEN_FILE, Path("x"))
    assert files(**MACHINE, security={"insecure": True}) == (None, None)
    assert files(**MACHINE, security={"tls": TLS}) == (CLUSTER_TOKEN_FILE, TOKENS_FILE)
    client_certificates = {**TLS, "require_client_cert": True, "client_ca": "d"}
    assert files(**MACHINE, security={"tls": client_certificates}) == (CLUSTER_TOKEN_FILE, None)


def test_up_makes_the_tokens_and_brings_them(tmp_path: Path, home: Path) -> None:
    """Whether or not the description has them."""
    security = Settings.load(None, **MACHINE).security  # type: ignore[arg-type]
    expected = {str(path): str(home / ".kvferry" / path.name) for path in (CLUSTER_TOKEN_FILE, TOKENS_FILE)}
    assert token_mounts(description(tmp_path), security) == expected
    assert all(Path(local).stat().st_mode & 0o777 == 0o600 for local in expected.values())
    (token,) = read_tokens(home / ".kvferry" / "cluster_token")
    client = (home / ".kvferry" / "client_token").read_text().strip()
    assert ClientTokens(home / ".kvferry" / "tokens.yaml").find(client) is not None
    assert token_mounts(read_description(SHIPPED / "local.yaml"), security) == expected
    assert read_tokens(home / ".kvferry" / "cluster_token") == (token,), "made once"
    assert require_files(Settings.load(None, **MACHINE)) is None  # type: ignore[arg-type, func-returns-value]
    assert peer_security(security).tokens == (token,)


def test_what_somebody_else_names_is_left_to_him(tmp_path: Path, home: Path) -> None:
    own = tmp_path / "own"
    make_missing_files(own)
    named = {"cluster_token_file": "/etc/a", "tokens_file": "/etc/b"}
    for given in ({"security": {"insecure": True}}, {"security": named}):
        security = Settings.load(None, **MACHINE, **given).security  # type: ignore[arg-type]
        assert token_mounts(description(tmp_path), security) == {}
    security = Settings.load(None, **MACHINE).security  # type: ignore[arg-type]
    mounts = {str(path): str(own / path.name) for path in (CLUSTER_TOKEN_FILE, TOKENS_FILE)}
    assert token_mounts(description(tmp_path, **mounts), security) == mounts
    assert not (home / ".kvferry").exists()


def test_a_deployment_without_its_files_is_not_started(home: Path) -> None:
    settings = Settings.load(None, **MACHINE)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="kvferry token setup"):
        require_files(settings)
    make_missing_files(home / ".kvferry")
    require_files(settings)
    (home / ".kvferry" / "tokens.yaml").unlink()
    with pytest.raises(OSError, match="kvferry token setup"):
        require_files(settings)
    require_files(Settings.load(None, **MACHINE, gateway={"count": 0}))  # type: ignore[arg-type]
    (home / ".kvferry" / "tokens.yaml").write_text("tokens: 5")
    with pytest.raises(ValueError, match="no file of tokens"):
        require_files(settings)


def test_the_configuration_that_a_description_brings(tmp_path: Path) -> None:
    assert mounted_config(description(tmp_path)) is None
    assert mounted_config(read_description(SHIPPED / "local.yaml")) == SHIPPED / "kvferry.yaml"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (MACHINE, "plain text"),
        ({"security": {"insecure": True}}, "security.insecure"),
        ({"store": {"host": "10.0.0.1"}}, "will be refused: set security.cluster_token_file"),
        ({"gateway": {"host": "10.0.0.1"}}, "will be refused: set security.tokens_file"),
        ({"gateway": {"host": "10.0.0.1"}, "security": {"tokens_file": "x"}}, "in plain text"),
    ],
)
def test_warnings(given: dict[str, Any], said: str) -> None:
    assert any(said in warning for warning in find_warnings(Settings.load(None, **given)))


def test_with_tls_and_tokens_there_is_no_warning() -> None:
    security = {"tls": TLS, "tokens_file": "x"}
    settings = Settings.load(None, gateway={"host": "10.0.0.1"}, store={"host": "10.0.0.1"}, security=security)
    assert find_warnings(settings) == []
