"""One running sequence's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvferry.kernels.sampling import SampledToken, SamplingParams, TokenHistory


@dataclass(frozen=True)
class TokenEvent:
    """A token of the answer; `finish_reason` is "" until the last one."""

    index: int
    token: SampledToken
    finish_reason: str


class SequenceListener(Protocol):
    """Hears of a sequence, on the engine's thread; must not block."""

    def token(self, sequence: Sequence, event: TokenEvent) -> None: ...

    def error(self, sequence: Sequence, error: Exception) -> None:
        """The sequence failed; it gets no more tokens."""
        ...

    def block_used(self, sequence: Sequence) -> None:
        """A spare block of the sequence is filled."""
        ...

    def released(self, sequence: Sequence) -> None:
        """The last call, unless the sequence is added again: the engine touches neither its slot nor its blocks."""
        ...


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A sequence from the handoff on. Between steps it can be taken out of the engine and added again.

    The first `num_blocks` of `block_ids` are complete, the others are spare: decode fills them. A sequence whose tail
    is full and that has no spare block stands still until `DecodeEngine.grant` gives it one.
    """

    num_prompt_tokens: int
    sampling: SamplingParams
    history: TokenHistory
    slot: int
    block_ids: list[int]
    num_blocks: int
    tail_len: int
    last_token: int
    listener: SequenceListener
    choice: int = 0
    """Which of the request's answers it is."""
    leaving: bool = False
    """Set by `DecodeEngine.remove`: it leaves before the next step."""

    @property
    def position(self) -> int:
        """Position of `last_token`, whose K and V the next step computes."""
        return self.num_prompt_tokens + self.history.num_output - 1

    @property
    def block_table(self) -> list[int]:
        return self.block_ids[: self.num_blocks]
