"""A SYNTHETIC trace in Mooncake's published format: made up from a seed, not recorded from anybody's service.

The format is a JSON object a line with `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids` (a
number for each block of 512 prompt tokens; equal numbers, equal beginnings). Conversations come as a Poisson process;
each begins with one of some system prompts, whose popularity falls as 1 / rank, continues with a document of its own or
a shared one, and has several turns, each with all of the one before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvferry.deploy.bench_serve.trace import BLOCK_TOKENS

NUM_SYSTEM_PROMPTS = 50
NUM_DOCUMENTS = 400
SHARED_SHARE = 0.5
"""Of the conversations, about one of the documents; the others bring text of their own."""
MEAN_TURNS = 3.0
MEAN_THINK_S = 20.0


@dataclass(frozen=True, kw_only=True)
class SyntheticTrace:
    num_requests: int
    requests_per_s: float
    seed: int = 0

    def rows(self) -> list[dict[str, Any]]:
        """By time."""
        rng = np.random.default_rng(self.seed)
        popularity = _falling(NUM_SYSTEM_PROMPTS)
        of_documents = _falling(NUM_DOCUMENTS)
        next_id = 10_000_000
        rows: list[dict[str, Any]] = []
        start_s, conversations_per_s = 0.0, self.requests_per_s / MEAN_TURNS
        while len(rows) < self.num_requests:
            start_s += float(rng.exponential(1 / conversations_per_s))
            system = int(rng.choice(NUM_SYSTEM_PROMPTS, p=popularity))
            ids = [1000 * system + i for i in range(1 + system % 3)]
            if rng.random() < SHARED_SHARE:
                document = int(rng.choice(NUM_DOCUMENTS, p=of_documents))
                # A block's number stands for all before it, too: a document is another one behind another beginning.
                first = 1_000_000 + 1000 * (document * NUM_SYSTEM_PROMPTS + system)
                ids += [first + i for i in range(4 + document % 28)]
            at_s = start_s
            for _ in range(int(rng.geometric(1 / MEAN_TURNS))):
                num_new = max(int(rng.lognormal(6.5, 1.0)), 16)
                count = num_new // BLOCK_TOKENS
                ids = [*ids, *range(next_id, next_id + count)]
                next_id += count + 1
                rows.append(
                    {
                        "timestamp": round(at_s * 1000),
                        "input_length": len(ids) * BLOCK_TOKENS + num_new % BLOCK_TOKENS + 1,
                        "output_length": int(rng.integers(16, 512)),
                        "hash_ids": [*ids, next_id - 1],
                    }
                )
                at_s += float(rng.exponential(MEAN_THINK_S))
        rows.sort(key=lambda row: row["timestamp"])
        return rows[: self.num_requests]


def write_trace(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _falling(count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    weights = 1 / np.arange(1, count + 1)
    return np.asarray(weights / weights.sum())
