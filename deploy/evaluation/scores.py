"""Comparing a distribution of the next token with the one on an unquantized cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class Oracle:
    """Log-probabilities on the unquantized cache, of the tokens that follow each window's context."""

    def __init__(self, windows: Tensor, *, context: int, logits: Tensor) -> None:
        """windows int64 [W, context + P + 1]; logits fp32 [W, P, V], of the tokens from context + 1 on."""
        self.targets = windows[:, context + 1 :]
        self.log_probs = logits.log_softmax(-1)


@dataclass
class Scores:
    """Sums over predicted tokens."""

    tokens: int = 0
    nll: float = 0.0
    nll_fp: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, oracle: Oracle, window: int, index: int, logits: Tensor) -> None:
        """One prediction, logits [V]: of token context + 1 + index of a window."""
        ours, theirs = logits.float().log_softmax(-1), oracle.log_probs[window, index]
        target = int(oracle.targets[window, index])
        self.tokens += 1
        self.nll -= float(ours[target])
        self.nll_fp -= float(theirs[target])
        self.divergence += float(torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True))
        self.agreed += int(ours.argmax() == theirs.argmax())

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def perplexity_fp(self) -> float:
        return math.exp(self.nll_fp / self.tokens)

    @property
    def kl(self) -> float:
        """KL divergence of the unquantized distribution from this one, nats a token."""
        return self.divergence / self.tokens

    @property
    def top1(self) -> float:
        return self.agreed / self.tokens
