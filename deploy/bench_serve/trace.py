"""Replays a trace in Mooncake's published format: one JSON object a line.

{"timestamp": 3052, "input_length": 1100, "output_length": 82, "hash_ids": [0, 1, 17]}

`timestamp` is in milliseconds, lengths are in tokens, and each id stands for a block of 512 prompt tokens; prompts that
begin with the same ids begin with the same tokens. What the ids do not cover is the request's own. See the README of
FAST25-release/traces in kvcache-ai/Mooncake.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from kvferry.deploy.bench_serve.workload import PlannedRequest, Stream, TokenIds, TokenSource, Workload

BLOCK_TOKENS = 512
MAX_LENGTH = 2**24  # tokens; more is no prompt but a mistake
_MAX_HASH_ID = 2**63
_CACHED_BLOCKS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRow:
    timestamp_ms: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()  # at most one for every 512 tokens begun


def read_trace(path: Path, *, limit: int | None = None) -> list[TraceRow]:
    """The first `limit` rows, by time. Raises OSError, or ValueError with file and line."""
    with path.open("rb") as lines:
        rows = list(islice(_rows(path, lines), limit))
    if not rows:
        raise ValueError(f"{path} has no requests")
    return sorted(rows, key=lambda row: row.timestamp_ms)


def replay(
    rows: list[TraceRow], tokens: TokenSource, *, speed: float = 1.0, block_tokens: int = BLOCK_TOKENS, window: int
) -> Workload:
    """Requests at the trace's times over `speed`, the first at 0.

    With `block_tokens` below 512 all lengths shrink in proportion, so that a small model can replay a trace of long
    prompts; what is shared stays shared. Requests that do not fit `window` tokens are left out and counted.
    """

    @lru_cache(_CACHED_BLOCKS)
    def block(hash_id: int) -> TokenIds:
        return tokens.take(Stream.BLOCK, hash_id, block_tokens)

    requests, due_s, first_ms = [], [], rows[0].timestamp_ms
    for index, row in enumerate(rows):
        input_len = _scaled(row.input_length, block_tokens)
        output_len = _scaled(row.output_length, block_tokens)
        if input_len + output_len > window:
            continue
        parts = [block(hash_id) for hash_id in row.hash_ids]
        own = max(0, input_len - block_tokens * len(parts))
        token_ids = np.concatenate([*parts, tokens.take(Stream.REST, index, own)])[:input_len]
        requests.append(PlannedRequest(token_ids=token_ids, max_tokens=output_len))
        due_s.append((row.timestamp_ms - first_ms) / 1000 / speed)
    if not requests:
        raise ValueError(
            f"no request of the trace fits the model's {window:,} tokens; a smaller --trace-block shrinks them"
        )
    return Workload(requests=requests, due_s=due_s, num_skipped=len(rows) - len(requests))


def _scaled(length: int, block_tokens: int) -> int:
    return math.ceil(length * block_tokens / BLOCK_TOKENS)


def _rows(path: Path, lines: Iterator[bytes]) -> Iterator[TraceRow]:
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            yield _row(json.loads(line))
        except RecursionError:
            raise ValueError(f"{path}:{number}: nested too deeply") from None
        except ValueError as error:  # JSON and Unicode errors are ValueErrors too
            raise ValueError(f"{path}:{number}: {error}") from None


def _row(row: Any) -> TraceRow:
    if not isinstance(row, dict):
        raise ValueError('not an object like {"timestamp": 0, "input_length": 600, "output_length": 8, ...}')
    timestamp = row.get("timestamp")
    if not _is_number(timestamp) or not 0 <= timestamp < 2**53:
        raise ValueError("timestamp must be milliseconds, 0 or more")
    input_length, output_length = _length(row, "input_length"), _length(row, "output_length")
    hash_ids = row.get("hash_ids", [])
    if not isinstance(hash_ids, list) or not all(_is_int(x) and 0 <= x < _MAX_HASH_ID for x in hash_ids):
        raise ValueError("hash_ids must be a list of integers, 0 or more")
    if len(hash_ids) > (most := math.ceil(input_length / BLOCK_TOKENS)):
        raise ValueError(
            f"{len(hash_ids)} hash_ids for {input_length} tokens: these are {most} blocks of {BLOCK_TOKENS}"
        )
    return TraceRow(
        timestamp_ms=float(timestamp),
        input_length=input_length,
        output_length=output_length,
        hash_ids=tuple(hash_ids),
    )


def _length(row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    if not _is_int(value) or not 1 <= value <= MAX_LENGTH:
        raise ValueError(f"{name} must be a number of tokens, 1 to {MAX_LENGTH:,}")
    return value


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[int | float]:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))
