"""Windows of a text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def default_text() -> str:
    """English reference prose that comes with every Python: the language reference that `help()` shows."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path | None) -> str:
    """Raises OSError, or ValueError for what is not UTF-8."""
    if path is None:
        return default_text()
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def windows(token_ids: list[int], *, length: int, count: int) -> Tensor:
    """int64 [W, length]: `count` windows, spread evenly over the text; they overlap where it is short.

    Raises ValueError when the text has fewer tokens than one window.
    """
    room = len(token_ids) - length
    if room < 0:
        raise ValueError(f"the text has {len(token_ids)} tokens, a window needs {length}: give a longer text")
    count = min(count, room + 1)
    starts = [room * i // max(1, count - 1) for i in range(count)]
    return torch.stack([torch.tensor(token_ids[start : start + length]) for start in starts])
