"""Which block of the pool holds what. Ids and reference counts only: no tensor is touched here."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable


class OutOfBlocks(Exception):
    """The pool has fewer free and evictable blocks than asked for."""


class BlockPool:
    """Block ids [0, num_blocks) with reference counts and a cache of complete prompt blocks by key.

    A block is in exactly one state:

        free        no content                              in `_free`
        used        ref count > 0; shared when > 1          in `_ref_counts`
        evictable   ref count 0, content kept under a key   in `_evictable`, oldest first
    """

    def __init__(self, num_blocks: int, *, on_drop: Callable[[int], None] = lambda block_id: None) -> None:
        """`on_drop` is called with each block whose content is given up."""
        self.num_blocks = num_blocks
        self._on_drop = on_drop
        self._free: deque[int] = deque(range(num_blocks))
        self._ref_counts: dict[int, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._id_of_key: dict[bytes, int] = {}
        self._key_of_id: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give now."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        return len(self._ref_counts)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody uses, kept under their keys."""
        return len(self._evictable)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks with ref count 1, evicting the least recently used cached ones if it must.

        Raises OutOfBlocks, taking none.
        """
        if count > self.num_available:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_available} available")
        taken = []
        for _ in range(count):
            if self._free:
                block_id = self._free.popleft()
            else:
                block_id, _ = self._evictable.popitem(last=False)
                del self._id_of_key[self._key_of_id.pop(block_id)]
                self._on_drop(block_id)
            self._ref_counts[block_id] = 1
            taken.append(block_id)
        return taken

    def share(self, key: bytes) -> int | None:
        """The block under `key` with its ref count raised, or None."""
        block_id = self._id_of_key.get(key)
        if block_id is None:
            return None
        self._evictable.pop(block_id, None)
        self._ref_counts[block_id] = self._ref_counts.get(block_id, 0) + 1
        return block_id

    def publish(self, block_id: int, key: bytes) -> None:
        """Names a used block, so that `share` finds it. The first block under a key stays."""
        assert block_id in self._ref_counts
        if key not in self._id_of_key and block_id not in self._key_of_id:
            self._id_of_key[key] = block_id
            self._key_of_id[block_id] = key

    def release(self, block_ids: list[int]) -> None:
        """Lowers the ref counts; a block that nobody uses becomes evictable if it has a key, else free."""
        # Later blocks first: a chain is evicted from its end, so that what is left is still a prefix.
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id]:
                continue
            del self._ref_counts[block_id]
            if block_id in self._key_of_id:
                self._evictable[block_id] = None
            else:
                self._free.append(block_id)
                self._on_drop(block_id)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every block is in exactly one state. Changes nothing."""
        free, used, evictable = set(self._free), set(self._ref_counts), set(self._evictable)
        assert len(free) == len(self._free)
        assert not (free & used or free & evictable or used & evictable)
        assert len(free) + len(used) + len(evictable) == self.num_blocks
        assert all(count > 0 for count in self._ref_counts.values())
        assert {k: b for b, k in self._key_of_id.items()} == self._id_of_key
        assert evictable <= set(self._key_of_id)
        assert not free & set(self._key_of_id)
