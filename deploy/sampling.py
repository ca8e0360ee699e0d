"""The client's sampling fields: defaults, allowed ranges, and the worker's message.

| field | default | allowed |
|---|---|---|
| max_tokens | 256, or what fits | 1 to the gateway's max_new_tokens; prompt and answer must fit the model |
| temperature | 0 (greedy) | 0 to 2 |
| top_p | 1 (off) | above 0, to 1 |
| top_k | 0 (off) | 0 to the vocabulary size |
| min_p | 0 (off) | 0 to 1 |
| seed | random 63-bit | any uint64 |
| repetition_penalty | 1 (off) | above 0, to 10 |
| presence_penalty, frequency_penalty | 0 (off) | -2 to 2 |
| stop | none | at most 16 strings of 1 to 256 characters |
| stop_token_ids | none | at most 64 ids of the vocabulary |
| top_logprobs | unset (no log-probabilities) | 0 to 20 |
| min_tokens | 0 | 0 to max_tokens |
| n | 1 | 1 to 16; answer i is sampled with seed + i |
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvferry.deploy.errors import InvalidField, PromptTooLong
from kvferry.proto import inference_pb2, worker_pb2

DEFAULT_MAX_TOKENS = 256
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TOP_LOGPROBS = 20
MAX_ANSWERS = 16


class Range(NamedTuple):
    default: float
    low: float
    high: float
    open_low: bool = False

    def holds(self, value: float) -> bool:
        """False for NaN."""
        return value <= self.high and (value > self.low if self.open_low else value >= self.low)

    def __str__(self) -> str:
        return f"{'above ' if self.open_low else ''}{self.low:g} to {self.high:g}"


FLOAT_RANGES = {
    "temperature": Range(0, 0, 2),
    "top_p": Range(1, 0, 1, open_low=True),
    "min_p": Range(0, 0, 1),
    "repetition_penalty": Range(1, 0, 10, open_low=True),
    "presence_penalty": Range(0, -2, 2),
    "frequency_penalty": Range(0, -2, 2),
}


@dataclass(frozen=True, kw_only=True)
class SamplingRules:
    """Checks requests against one model and one gateway."""

    max_new_tokens: int
    vocab_size: int
    eos_token_ids: Sequence[int] = ()

    def read(self, sampling: inference_pb2.Sampling) -> worker_pb2.SamplingParams:
        """The worker's message, all defaults filled in; raises `InvalidField`.

        `max_tokens` stays 0 when the client left it to us: `fit_max_tokens` sets it once the prompt is counted.
        """
        params = worker_pb2.SamplingParams()
        for name, allowed in FLOAT_RANGES.items():
            value = getattr(sampling, name) if sampling.HasField(name) else allowed.default  # type: ignore[arg-type]
            if not allowed.holds(value):
                raise _outside(name, f"{value:.6g}", str(allowed))
            setattr(params, name, value)
        params.top_k = self._integer("top_k", sampling.top_k, 0, self.vocab_size)
        if sampling.HasField("max_tokens"):
            params.max_tokens = self._integer("max_tokens", sampling.max_tokens, 1, self.max_new_tokens)
        params.min_tokens = self._integer(
            "min_tokens", sampling.min_tokens, 0, params.max_tokens or self.max_new_tokens
        )
        params.logprobs = sampling.HasField("top_logprobs")
        params.top_logprobs = self._integer("top_logprobs", sampling.top_logprobs, 0, MAX_TOP_LOGPROBS)
        params.n = self._integer("n", sampling.n, 1, MAX_ANSWERS) if sampling.HasField("n") else 1
        params.seed = sampling.seed if sampling.HasField("seed") else secrets.randbits(63)
        params.stop_token_ids.extend(self._stop_token_ids(sampling))
        self._check_stop(sampling.stop)
        return params

    def fit_max_tokens(
        self,
        params: worker_pb2.SamplingParams,
        *,
        num_prompt_tokens: int,
        max_model_len: int,
    ) -> None:
        """Sets a default `max_tokens` that fits; raises `PromptTooLong` when prompt and answer cannot fit."""
        room = max_model_len - num_prompt_tokens
        if room < 1:
            raise PromptTooLong(
                f"The prompt has {num_prompt_tokens:,} tokens; the model holds {max_model_len:,} tokens, "
                "prompt and answer together."
            )
        if not params.max_tokens:
            wanted = max(DEFAULT_MAX_TOKENS, params.min_tokens)
            params.max_tokens = min(wanted, self.max_new_tokens, room)
            if params.min_tokens > params.max_tokens:
                raise _outside("min_tokens", params.min_tokens, f"0 to {params.max_tokens} for this prompt")
        elif params.max_tokens > room:
            raise PromptTooLong(
                f"The prompt has {num_prompt_tokens:,} tokens and max_tokens is {params.max_tokens:,}, together "
                f"{num_prompt_tokens + params.max_tokens:,}; the model holds {max_model_len:,} tokens."
            )

    def _integer(self, name: str, value: int, low: int, high: int) -> int:
        if not low <= value <= high:
            raise _outside(name, value, f"{low} to {high}")
        return value

    def _stop_token_ids(self, sampling: inference_pb2.Sampling) -> list[int]:
        if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise _outside(
                "stop_token_ids",
                f"a list of {len(sampling.stop_token_ids)}",
                f"at most {MAX_STOP_TOKEN_IDS} ids",
            )
        for index, token_id in enumerate(sampling.stop_token_ids):
            self._integer(f"stop_token_ids[{index}]", token_id, 0, self.vocab_size - 1)
        end = () if sampling.ignore_eos else self.eos_token_ids
        return list(dict.fromkeys((*end, *sampling.stop_token_ids)))

    def _check_stop(self, stop: Sequence[str]) -> None:
        if len(stop) > MAX_STOP_STRINGS:
            raise _outside("stop", f"a list of {len(stop)}", f"at most {MAX_STOP_STRINGS} strings")
        for index, text in enumerate(stop):
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise _outside(
                    f"stop[{index}]",
                    f"{len(text)} characters long",
                    f"1 to {MAX_STOP_CHARACTERS} characters",
                )


def _outside(name: str, value: object, allowed: str) -> InvalidField:
    return InvalidField(f"sampling.{name} is {value}; allowed: {allowed}.")
