"""One prompt on its way through the prefill engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvferry.kernels.sampling import SampledToken, SamplingParams
from kvferry.prefill.prompt_blocks import PromptBlocks


@dataclass(eq=False, kw_only=True)
class PrefillJob:
    """A prompt to compute from its block `blocks.num_ready` on.

    The callbacks run on the engine's thread and must not block: `on_layer(first, end, layer)` after the running pass's
    blocks [first, end) are packed in a layer (the incomplete block counts as one), `on_block(index)` after a block is
    packed in every layer, then `on_done(first_tokens)`, or `on_error(error)` instead. After `cancel()` none of them is
    called again once the running pass has ended.
    """

    token_ids: list[int]
    sampling: SamplingParams
    blocks: PromptBlocks
    on_block: Callable[[int], None]
    on_done: Callable[[list[SampledToken]], None]
    """Gets the first token of each answer; none of a `warm` job."""
    on_error: Callable[[Exception], None]
    on_layer: Callable[[int, int, int], None] = lambda first, end, layer: None
    """Not called for blocks that another job computed."""
    tenant: str = ""
    priority: int = 0
    """Lower goes first."""
    warm: bool = False
    """Only the complete blocks are wanted, and only when nothing else waits; `token_ids` end on the grid."""
    num_answers: int = 1
    """Answer i is sampled with the seed of `sampling` plus i."""
    deadline: float | None = None
    """Of time.monotonic(): the job ends with DeadlinePassed when it has no first token by then."""
    keys: Sequence[bytes] = ()
    """The key of each complete block: jobs with a key in common compute its block once. Empty: not shared."""
    submitted: float = field(default_factory=time.monotonic)
    queue_seconds: float | None = None
    compute_seconds: float = 0.0
    num_shared_blocks: int = 0
    """Blocks that another job of this worker computed."""
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def num_left(self) -> int:
        """Tokens to compute."""
        return len(self.token_ids) - self.blocks.num_ready * self.blocks.layout.block_size
