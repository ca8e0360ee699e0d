"""The blocks that requests of this worker hold now, by block key: what is computed once need not be again."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

from kvferry.prefill.prompt_blocks import PromptBlocks


class SharedBlocks:
    """Finds a block that another running request has. Belongs to the engine's thread.

    Nobody waits for anybody here. One pass runs at a time, so a block is either complete, and then its bytes are taken,
    or not even begun, and then whoever has the turn computes it for all. A request that is cancelled or fails leaves
    its complete blocks until its memory goes; what it has not computed, the next one in turn does.

    A key names tenant, weights, quantization and all tokens up to the block's end, so equal keys mean equal bytes, and
    no tenant ever gets another one's block. Entries are weak: they hold no memory.
    """

    def __init__(self) -> None:
        self._holders: WeakValueDictionary[bytes, PromptBlocks] = WeakValueDictionary()

    def offer(self, keys: Sequence[bytes], blocks: PromptBlocks) -> None:
        """Makes the complete ones of `blocks` known. Block i of the prompt has the key `keys[i]`."""
        for key in keys[: blocks.num_ready]:
            if key not in self._holders:
                self._holders[key] = blocks

    def take(self, keys: Sequence[bytes], blocks: PromptBlocks, *, limit: int) -> None:
        """Copies into `blocks` what others have of its next blocks, without a gap, up to `limit` complete ones."""
        for index in range(blocks.num_ready, min(limit, len(keys))):
            holder = self._holders.get(keys[index])
            if holder is None or holder is blocks:
                return
            blocks.copy(index, holder)
