"""Which places hold which blocks, as far as one gateway has seen: approximate, bounded, and it forgets.

A place is the store, a prefill worker's cache of records, or a decode worker's pool. The index learns only from the
requests that its gateway placed; nobody tells it of evictions, so what it knows expires. It holds block keys and
places, no tokens: a key names tenant, model and all tokens up to its block's end, so no tenant's prompt finds another's
blocks.
A wrong entry costs time, never a wrong answer: workers look for themselves.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

KEY_BYTES = 16
"""Of a block key. Enough to tell blocks apart; a collision could only mislead a choice."""
STORE = 0
"""The slot of the store. All its nodes are one place."""
ENTRY_BYTES = 384
"""Of one block, at most, without the bits of its places (tests/deploy/routing/test_index.py measures it)."""


class Holdings(NamedTuple):
    """Who holds how much of one chain of blocks."""

    steps: tuple[tuple[int, int], ...]
    """(blocks from the start, bits of the places that hold all of them), each with fewer places than the one before."""

    def depth(self, slot: int) -> int:
        """Blocks from the start, without a gap, that the place holds."""
        deepest = 0
        for depth, places in self.steps:
            if not places >> slot & 1:
                break
            deepest = depth
        return deepest

    def deepest(self, limit: int) -> list[int]:
        """Slots of workers that hold something, those that hold the most first; at most `limit`."""
        slots: list[int] = []
        seen = 1 << STORE
        for _, places in reversed(self.steps):
            left = places & ~seen
            seen |= places
            while left and len(slots) < limit:
                lowest = left & -left
                left ^= lowest
                slots.append(lowest.bit_length() - 1)
        return slots


NOTHING = Holdings(())


class PrefixIndex:
    """Least recently used blocks go when there are more than `capacity_bytes`; a holding is forgotten between half of
    `ttl_s` and all of it after it was last recorded."""

    def __init__(self, *, capacity_bytes: int, ttl_s: float) -> None:
        self._capacity_bytes = capacity_bytes
        self._half_ttl_s = ttl_s / 2
        self._entries: OrderedDict[bytes, list[int]] = OrderedDict()  # [generation, places in it, places before it]
        self._slots: dict[str, int] = {}
        self._places: dict[int, str] = {}
        self._free: list[tuple[float, int]] = []  # (since when, slot)
        self._num_slots = 1

    def __len__(self) -> int:
        """Blocks."""
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """An upper estimate of the memory that it takes."""
        return len(self._entries) * self._entry_bytes

    def slot(self, place: str, now: float) -> int:
        """The number of a worker's place, a new one for a place that is not known."""
        slot = self._slots.get(place)
        if slot is None:
            # A slot that was given back is used again only when all that is recorded of it has expired.
            if self._free and now - self._free[0][0] > 2 * self._half_ttl_s:
                slot = self._free.pop(0)[1]
            else:
                slot = self._num_slots
                self._num_slots += 1
            self._slots[place] = slot
            self._places[slot] = place
        return slot

    def place(self, slot: int) -> str:
        """The worker's place with this number; empty for one that is forgotten, and for the store."""
        return self._places.get(slot, "")

    def forget_place(self, place: str, now: float) -> None:
        """The worker is gone, and what it held; one that comes back begins with nothing."""
        slot = self._slots.pop(place, None)
        if slot is not None:
            del self._places[slot]
            self._free.append((now, slot))

    def record(self, keys: Sequence[bytes], slots: Sequence[int], now: float) -> None:
        """These places hold all blocks of a chain now."""
        generation = self._generation(now)
        places = 0
        for slot in slots:
            places |= 1 << slot
        # The last block first, so that under pressure a chain loses its end before its beginning.
        for key in reversed(keys):
            short = key[:KEY_BYTES]
            entry = self._entries.get(short)
            if entry is None:
                self._entries[short] = [generation, places, 0]
            else:
                _age(entry, generation)
                entry[1] |= places
                self._entries.move_to_end(short)
        most = self._capacity_bytes // self._entry_bytes
        while len(self._entries) > most:
            self._entries.popitem(last=False)

    def find(self, keys: Sequence[bytes], now: float) -> Holdings:
        """Who holds what of a chain. Changes nothing that is held; the blocks found count as used."""
        generation = self._generation(now)
        steps: list[tuple[int, int]] = []
        entries = self._entries
        alive = -1
        found = 0
        for key in keys:
            entry = entries.get(key[:KEY_BYTES])
            if entry is None:
                break
            age = generation - entry[0]
            places = alive & (entry[1] | entry[2] if age == 0 else entry[1] if age == 1 else 0)
            if not places:
                break
            if places != alive and found:
                steps.append((found, alive))
            alive = places
            found += 1
        if not found:
            return NOTHING
        steps.append((found, alive))
        for key in reversed(keys[:found]):
            entries.move_to_end(key[:KEY_BYTES])
        return Holdings(tuple(steps))

    @property
    def _entry_bytes(self) -> int:
        return ENTRY_BYTES + 2 * (self._num_slots // 8)

    def _generation(self, now: float) -> int:
        return math.floor(now / self._half_ttl_s)


def _age(entry: list[int], generation: int) -> None:
    """Moves an entry's places on to `generation`; those that are too old are forgotten."""
    age = generation - entry[0]
    if age > 0:
        entry[0], entry[1], entry[2] = generation, 0, entry[1] if age == 1 else 0
