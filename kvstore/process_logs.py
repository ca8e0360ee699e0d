"""How every process logs: one line an event on standard error, as text or as JSON, with the request's id.

Nothing in a line may show a prompt, a token, a key or a password. Messages of ours do not; the message of an exception
that nobody foresaw might, so of exceptions the lines name type and place only.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

from kvferry.proto.request_id import current_request_id

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

CHATTY = (
    "asyncio",
    "filelock",
    "grpc",
    "h11",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "ray",
    "transformers",
    "urllib3",
)
"""Libraries that say a lot below WARNING, some of it about what they work on."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How to log. Raises ValueError for another format or level."""

    format: LogFormat = "text"
    level: LogLevel = "info"

    def __post_init__(self) -> None:
        for name, allowed in (("format", get_args(LogFormat)), ("level", get_args(LogLevel))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"the log {name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")


def configure_logs(config: LogConfig, *, process: str) -> None:
    """Sets up the root logger of this process, which calls itself `process` in every line. For a process of ours only:
    whoever uses kvferry as a library keeps its own set-up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process) if config.format == "json" else TextLines(process))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(config.level.upper())
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


class TextLines(logging.Formatter):
    """time level process logger: message name=value … request_id=…"""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        if request_id := current_request_id():
            fields["request_id"] = request_id
        told = "".join(f" {name}={value}" for name, value in fields.items())
        line = f"{_time(record)} {record.levelname} {self._process} {record.name}: {record.getMessage()}{told}"
        return "\n".join([line, *_trace(record)])


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, process, pid, logger, message, request_id, then the event's own fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := current_request_id():
            line["request_id"] = request_id
        line |= {name: value for name, value in _fields(record).items() if name not in line}
        if trace := _trace(record):
            line["trace"] = trace
        return json.dumps(line, default=str, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """What the event gave as `extra={"fields": {…}}`: numbers, names and addresses."""
    fields = getattr(record, "fields", None)
    return dict(fields) if isinstance(fields, dict) else {}


def _trace(record: logging.LogRecord) -> list[str]:
    """Types and places of the exception and of what caused it; never their messages."""
    error = record.exc_info[1] if record.exc_info else None
    lines: list[str] = []
    while error is not None and len(lines) < 100:
        lines.append(f"{type(error).__module__}.{type(error).__qualname__}")
        lines += [f"  {f.filename}:{f.lineno} in {f.name}" for f in traceback.extract_tb(error.__traceback__)]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return lines
