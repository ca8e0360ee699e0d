"""Which block of the pool holds what. Ids and reference counts only: no tensor is touched here."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain


class OutOfBlocks(Exception):
    """The pool has fewer free and evictable blocks than asked for."""


class BlockPool:
    """Block ids [0, num_blocks) with reference counts and a cache of complete prompt blocks by key.

    A block is in exactly one state:

        free        no content                              in `_free`
        used        ref count > 0; shared when > 1          in `_ref_counts`
        evictable   ref count 0, content kept under a key   in `_evictable`, oldest first

    Blocks may lie on several devices, each with a share of every context: id b on device b mod `num_shares`. A
    sequence's block of index i goes to device i mod `num_shares`, so that a key names a block of one device whoever
    asks for it, and no device has more than one block of a sequence more than another, however long it grows.
    """

    def __init__(
        self, num_blocks: int, *, on_drop: Callable[[int], None] = lambda block_id: None, num_shares: int = 1
    ) -> None:
        """`num_blocks`: of all devices, a multiple of `num_shares`. `on_drop` is called with each block whose content
        is given up."""
        assert num_blocks % num_shares == 0
        self.num_blocks = num_blocks
        self._num_shares = num_shares
        self._on_drop = on_drop
        self._free = [deque(range(device, num_blocks, num_shares)) for device in range(num_shares)]
        self._ref_counts: dict[int, int] = {}
        self._evictable: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_shares)]
        self._id_of_key: dict[bytes, int] = {}
        self._key_of_id: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Blocks that nobody uses, on all devices."""
        return sum(map(len, self._free)) + self.num_cached

    @property
    def num_used(self) -> int:
        return len(self._ref_counts)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody uses, kept under their keys."""
        return sum(map(len, self._evictable))

    def largest_share(self, indices: Iterable[int]) -> int:
        """The blocks that the fullest device would hold of blocks with these indices."""
        return max(self._on_devices(indices).values(), default=0)

    @property
    def share_blocks(self) -> int:
        """Blocks of each device."""
        return self.num_blocks // self._num_shares

    def has_room(self, indices: Iterable[int], *, given_back: Iterable[int] = ()) -> bool:
        """Whether `allocate` could give these, once the blocks `given_back` were released."""
        released = self._on_devices(given_back)
        return all(
            count <= len(self._free[device]) + len(self._evictable[device]) + released[device]
            for device, count in self._on_devices(indices).items()
        )

    def allocate(self, indices: Sequence[int]) -> list[int]:
        """Takes a block with ref count 1 for each of these indices in a sequence, evicting the least recently used
        cached ones of its device if it must.

        Raises OutOfBlocks, taking none.
        """
        if not self.has_room(indices):
            raise OutOfBlocks(
                f"{len(indices)} blocks wanted, {self.num_available} available on {self._num_shares} devices"
            )
        taken = []
        for index in indices:
            device = index % self._num_shares
            if self._free[device]:
                block_id = self._free[device].popleft()
            else:
                block_id, _ = self._evictable[device].popitem(last=False)
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
        self._evictable[block_id % self._num_shares].pop(block_id, None)
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
                self._evictable[block_id % self._num_shares][block_id] = None
            else:
                self._free[block_id % self._num_shares].append(block_id)
                self._on_drop(block_id)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every block is in exactly one state. Changes nothing."""
        free, used, evictable = set(chain(*self._free)), set(self._ref_counts), set(chain(*self._evictable))
        assert len(free) == sum(map(len, self._free))
        for places in (self._free, self._evictable):
            assert all(b % self._num_shares == device for device, ids in enumerate(places) for b in ids)
        assert not (free & used or free & evictable or used & evictable)
        assert len(free) + len(used) + len(evictable) == self.num_blocks
        assert all(count > 0 for count in self._ref_counts.values())
        assert {k: b for b, k in self._key_of_id.items()} == self._id_of_key
        assert evictable <= set(self._key_of_id)
        assert not free & set(self._key_of_id)

    def _on_devices(self, numbers: Iterable[int]) -> Counter[int]:
        """How many of these indices, or ids, are of each device."""
        return Counter(number % self._num_shares for number in numbers)
