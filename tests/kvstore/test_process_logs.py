"""The lines that every process logs, and what they never hold."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest

from kvferry.kvstore.process_logs import JsonLines, LogConfig, TextLines, configure_logs
from kvferry.proto.request_id import bind_from_metadata, bind_request_id, current_request_id, request_id_metadata


@pytest.fixture(autouse=True)
def own_context() -> Iterator[None]:
    bind_request_id("")
    yield
    bind_request_id("")


def record(
    message: str, /, *arguments: object, error: BaseException | None = None, **fields: object
) -> logging.LogRecord:
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    made = logging.LogRecord("kvferry.test", logging.WARNING, __file__, 1, message, arguments, exc_info)
    made.fields = fields
    return made


def failed(secret: str) -> BaseException:
    try:
        try:
            raise ValueError(secret)
        except ValueError as error:
            raise RuntimeError(f"again {secret}") from error
    except RuntimeError as error:
        return error


def test_json() -> None:
    bind_request_id("r-1")
    line = json.loads(JsonLines("gateway").format(record("%d of %s", 3, "four\nlines", tokens=5, seconds=0.5)))
    assert line["message"] == "3 of four\nlines" and line["level"] == "warning" and line["process"] == "gateway"
    assert line["request_id"] == "r-1" and line["tokens"] == 5 and line["seconds"] == 0.5
    assert line["logger"] == "kvferry.test" and line["time"].endswith("Z") and line["pid"] > 0
    assert "\n" not in JsonLines("gateway").format(record("two\nlines", error=failed("x")))


def test_fields_do_not_replace_the_lines_own() -> None:
    line = json.loads(JsonLines("gateway").format(record("said", level="nothing", message="other")))
    assert line["level"] == "warning" and line["message"] == "said"


def test_text() -> None:
    bind_request_id("r-2")
    line = TextLines("store").format(record("said", tokens=5))
    assert line.endswith("WARNING store kvferry.test: said tokens=5 request_id=r-2")


@pytest.mark.parametrize("lines", [JsonLines("x"), TextLines("x")], ids=["json", "text"])
def test_of_an_exception_type_and_place_only(lines: logging.Formatter) -> None:
    text = lines.format(record("it failed", error=failed("canary")))
    assert "canary" not in text
    assert "builtins.RuntimeError" in text and "builtins.ValueError" in text
    assert "test_process_logs.py:" in text and " in failed" in text


def test_configured_once_and_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        configure_logs(LogConfig(), process="a")
        configure_logs(LogConfig(format="json", level="debug"), process="b")
        logging.getLogger("kvferry.x").debug("seen")
        logging.getLogger("urllib3").info("not seen")
        (line,) = capsys.readouterr().err.splitlines()
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert json.loads(line)["process"] == "b"


@pytest.mark.parametrize("given", [{"format": "xml"}, {"level": "loud"}])
def test_what_is_no_setting(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        LogConfig(**given)  # type: ignore[arg-type]


async def test_an_id_follows_its_tasks_and_no_others() -> None:
    async def work(request_id: str) -> tuple[str, str]:
        bind_request_id(request_id)
        await asyncio.sleep(0)
        child = await asyncio.create_task(_current())
        return current_request_id(), child

    told = await asyncio.gather(asyncio.create_task(work("a")), asyncio.create_task(work("b")))
    assert told == [("a", "a"), ("b", "b")]
    assert request_id_metadata() == ()


async def _current() -> str:
    return current_request_id()


@pytest.mark.parametrize("bad", ["two\nlines", "a b", "x" * 129, "é"])
def test_what_is_no_id_counts_as_none(bad: str) -> None:
    bind_request_id("before")
    bind_request_id(bad)
    assert current_request_id() == ""
    bind_from_metadata([("other", "x"), ("kvferry-request-id", "good")])
    assert current_request_id() == "good"
    bind_from_metadata([("kvferry-request-id", bad)])
    assert current_request_id() == ""
    bind_from_metadata(None)
    assert request_id_metadata() == ()
