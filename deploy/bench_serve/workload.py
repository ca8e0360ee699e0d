"""What to send: a function of the options and the seed alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import grpc
import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.uint32]

DEFAULT_VOCAB_SIZE = 10_000  # nearly every tokenizer has so many
_SPECIAL_IDS = 256  # tokenizers keep special tokens and single bytes at the start; prompts stay clear of them


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRequest:
    token_ids: TokenIds  # [tokens of the prompt]
    max_tokens: int  # and, as end tokens are ignored, exactly so many are asked for
    kind: str = "normal"
    expected: grpc.StatusCode = grpc.StatusCode.OK  # what the request is made to end with
    model: str | None = None  # None: the served one
    temperature: float = 0.0
    timeout_s: float | None = None  # None: the run's
    cancel_after: int | None = None  # leave after so many tokens; 0: before the first


@dataclass(frozen=True, kw_only=True)
class Workload:
    requests: Sequence[PlannedRequest]
    due_s: Sequence[float] | None = None  # when to send each, from the start; None: the arrival process says
    num_skipped: int = 0  # rows of a trace that do not fit the model


class Stream(IntEnum):
    """Independent random numbers of one seed."""

    LENGTHS = 0
    ORDER = 1
    ARRIVALS = 2
    UNIQUE = 3
    PREFIX = 4
    BLOCK = 5
    REST = 6
    WARMUP = 7


class TokenSource:
    """Random token ids; the same `stream` and `key` always give the same ones."""

    def __init__(self, *, seed: int, vocab_size: int = DEFAULT_VOCAB_SIZE) -> None:
        if vocab_size < 2:
            raise ValueError(f"--vocab-size {vocab_size}: prompts need at least 2 token ids")
        self._seed = seed
        self._range = min(_SPECIAL_IDS, vocab_size // 2), vocab_size

    def generator(self, stream: Stream, key: int = 0) -> np.random.Generator:
        return np.random.default_rng((self._seed, stream, key))

    def take(self, stream: Stream, key: int, count: int) -> TokenIds:
        """[count]"""
        return self.generator(stream, key).integers(*self._range, size=count, dtype=np.uint32)


def draw_lengths(generator: np.random.Generator, length: int, range_ratio: float, count: int) -> list[int]:
    """`count` lengths, uniform from length * (1 - range_ratio) to length * (1 + range_ratio), at least 1."""
    low = max(1, math.floor(length * (1 - range_ratio)))
    high = max(low, math.ceil(length * (1 + range_ratio)))
    return [int(x) for x in generator.integers(low, high, size=count, endpoint=True)]


def unique_prompts(
    tokens: TokenSource,
    *,
    count: int,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    stream: Stream = Stream.UNIQUE,
) -> list[PlannedRequest]:
    """Prompts that share nothing: no cache helps, unless a run with this seed came before."""
    lengths = tokens.generator(Stream.LENGTHS)
    inputs = draw_lengths(lengths, input_len, range_ratio, count)
    outputs = draw_lengths(lengths, output_len, range_ratio, count)
    return [
        PlannedRequest(token_ids=tokens.take(stream, index, inputs[index]), max_tokens=outputs[index])
        for index in range(count)
    ]


def shared_prefixes(
    tokens: TokenSource,
    *,
    count: int,
    prefix_len: int,
    num_prefixes: int,
    suffix_len: int,
    output_len: int,
    range_ratio: float = 0.0,
) -> list[PlannedRequest]:
    """Each prompt is one of `num_prefixes` prefixes, at random, and a suffix of its own; suffixes vary in length."""
    lengths = tokens.generator(Stream.LENGTHS)
    suffixes = draw_lengths(lengths, suffix_len, range_ratio, count)
    outputs = draw_lengths(lengths, output_len, range_ratio, count)
    chosen = tokens.generator(Stream.ORDER).integers(num_prefixes, size=count)
    prefixes = [tokens.take(Stream.PREFIX, index, prefix_len) for index in range(num_prefixes)]
    return [
        PlannedRequest(
            token_ids=np.concatenate([prefixes[chosen[index]], tokens.take(Stream.UNIQUE, index, suffixes[index])]),
            max_tokens=outputs[index],
        )
        for index in range(count)
    ]
