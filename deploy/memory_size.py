"""The size of a block pool as people write it: bytes, or a share of what is free."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from kvferry.kvstore.size import parse_size


def parse_kv_memory(value: object) -> object:
    """Bytes as int, or a share of the device's free memory as float in (0, 1]: "2GiB", 1000000 or "80%"."""
    if not isinstance(value, str):
        if isinstance(value, float):
            raise ValueError(f"{value} is not a memory size: write for example 2GiB, or 80% of the free memory")
        return value
    text = value.strip()
    if not text.endswith("%"):
        return parse_size(text)
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"{value!r} is not a share of memory; write for example 80%")
    return share


def _check(value: int | float) -> int | float:
    if value <= 0:
        raise ValueError("the block pool needs memory: write for example 2GiB, or 80%")
    return value


KVMemory = Annotated[
    int | float, BeforeValidator(lambda value: _check(parse_kv_memory(value)), json_schema_input_type=int | str)
]
