"""Choosing the next token. A pure function of (logits, parameters, history, index): the same in any batch.

Randomness is counter-based: (seed, index) decides the uniform number of a token, so neither the company in a batch
nor a restart on another worker changes a sample.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

MAX_TOP_LOGPROBS = 20


class SamplingFields(Protocol):
    """The parameters as they come over the wire, where 0 means "off"."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int
    min_tokens: int
    n: int
    logprobs: bool
    top_logprobs: int

    @property
    def stop_token_ids(self) -> Iterable[int]: ...


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy decoding without penalties."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    """None: no log-probabilities; n: of the chosen token and of the n likeliest ones."""
    n: int = 1
    """Answers to one prompt."""

    def for_choice(self, choice: int) -> SamplingParams:
        """The parameters of answer `choice` of the `n`: those of a request of its own with another seed."""
        return replace(self, seed=(self.seed + choice) % 2**64, n=1)

    @classmethod
    def of(cls, fields: SamplingFields) -> SamplingParams:
        return cls(
            temperature=fields.temperature,
            top_p=fields.top_p or 1.0,
            top_k=fields.top_k,
            min_p=fields.min_p,
            seed=fields.seed,
            repetition_penalty=fields.repetition_penalty or 1.0,
            presence_penalty=fields.presence_penalty,
            frequency_penalty=fields.frequency_penalty,
            max_tokens=fields.max_tokens,
            min_tokens=fields.min_tokens,
            stop_token_ids=frozenset(fields.stop_token_ids),
            top_logprobs=fields.top_logprobs if fields.logprobs else None,
            n=fields.n or 1,
        )


class SampledToken(NamedTuple):
    token_id: int
    logprob: float | None
    """Natural logarithm, of the model's own distribution (before penalties and temperature)."""
    top_logprobs: list[tuple[int, float]]


@dataclass
class TokenHistory:
    """The tokens of one sequence, as the penalties need them."""

    prompt: frozenset[int]
    output: Counter[int] = field(default_factory=Counter)
    num_output: int = 0

    @classmethod
    def of(cls, prompt_ids: Iterable[int]) -> TokenHistory:
        return cls(frozenset(prompt_ids))

    def append(self, token_id: int) -> None:
        self.output[token_id] += 1
        self.num_output += 1


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on (seed, index) alone."""
    raw = hashlib.sha256(b"kvferry-sample" + seed.to_bytes(8, "little") + index.to_bytes(8, "little"))
    return int.from_bytes(raw.digest()[:8], "little") / 2.0**64


def finish_reason(token_id: int, history: TokenHistory, params: SamplingParams) -> str:
    """Why the answer ends with this token, or "". `history` includes the token."""
    if token_id in params.stop_token_ids and history.num_output > params.min_tokens:
        return "stop"
    return "length" if history.num_output >= params.max_tokens else ""


def sample(logits: Tensor, params: SamplingParams, history: TokenHistory) -> SampledToken:
    """Chooses the next token of one sequence.

    logits: fp32 [vocab_size]; not modified. The index of the new token is `history.num_output`.
    Raises ValueError when the logits are not finite.
    """
    chosen = _choose(_adjusted(logits, params, history), params, history.num_output)
    if params.top_logprobs is None:
        return SampledToken(chosen, None, [])
    logprobs = torch.log_softmax(logits, dim=-1)
    top: list[tuple[int, float]] = []
    if params.top_logprobs:
        values, ids = logprobs.topk(params.top_logprobs)
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return SampledToken(chosen, float(logprobs[chosen]), top)


def _adjusted(logits: Tensor, params: SamplingParams, history: TokenHistory) -> Tensor:
    """Logits after penalties and forbidden tokens."""
    banned = params.stop_token_ids if history.num_output < params.min_tokens else frozenset()
    has_penalty = params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    if not has_penalty and not banned:
        return logits
    logits = logits.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(history.prompt | history.output.keys()), device=logits.device)
        picked = logits[seen]
        logits[seen] = torch.where(picked > 0, picked / params.repetition_penalty, picked * params.repetition_penalty)
    if history.output and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(history.output.keys()), device=logits.device)
        counts = torch.tensor(list(history.output.values()), device=logits.device).float()
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if banned:
        logits[torch.tensor(sorted(banned), device=logits.device)] = -torch.inf
    return logits


def _choose(logits: Tensor, params: SamplingParams, index: int) -> int:
    if params.temperature <= 0.0:
        best = int(logits.argmax())
        if not torch.isfinite(logits[best]):
            raise ValueError("the model's logits are not finite")
        return best
    probs = torch.softmax(logits.double() / params.temperature, dim=-1)
    ordered, ids = probs.sort(descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.min_p > 0.0:
        keep &= ordered >= params.min_p * ordered[0]
    if params.top_k > 0:
        keep[params.top_k :] = False
    if params.top_p < 1.0:
        mass = (ordered * keep) / (ordered * keep).sum()
        keep &= mass.cumsum(-1) - mass < params.top_p
    keep[0] = True
    cumulative = (ordered * keep).cumsum(-1)
    total = float(cumulative[-1])
    if not total > 0.0:
        raise ValueError("the model's logits are not finite")
    target = uniform(params.seed, index) * total
    position = int(torch.searchsorted(cumulative, torch.tensor(target).double(), right=True))
    return int(ids[min(position, int(keep.nonzero()[-1]))])
