"""One running request's state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvferry.kernels.sampling import SampledToken, SamplingParams, TokenHistory


@dataclass(frozen=True)
class TokenEvent:
    """A token of the answer; `finish_reason` is "" until the last one."""

    index: int
    token: SampledToken
    finish_reason: str


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A sequence from the handoff on.

    `block_ids` are all blocks reserved for it: the first `num_blocks` are complete, the others are for what decode
    will fill. `on_token`, `on_error` and `on_released` are called on the engine's thread and must not block;
    `on_released` is the last call: from then on the engine touches neither the slot nor the blocks.
    """

    num_prompt_tokens: int
    sampling: SamplingParams
    history: TokenHistory
    slot: int
    block_ids: list[int]
    num_blocks: int
    tail_len: int
    last_token: int
    on_token: Callable[[TokenEvent], None]
    on_error: Callable[[Exception], None]
    on_released: Callable[[], None]
    cancelled: bool = False

    @property
    def position(self) -> int:
        """Position of `last_token`, whose K and V the next step computes."""
        return self.num_prompt_tokens + self.history.num_output - 1

    @property
    def block_table(self) -> list[int]:
        return self.block_ids[: self.num_blocks]
