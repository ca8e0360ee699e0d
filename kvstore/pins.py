"""Pins: records that an operator keeps in the store until he lets them go."""

from __future__ import annotations

import math
from collections.abc import Iterator

DEFAULT_PINNED_SHARE = 0.5


class PinTable:
    """Which keys of one tier are pinned, and their bytes. Bounded to a share of the tier's capacity.

    Unlike a lease, a pin has no end of its own. The tier forgets the pin of a record that it deletes.
    """

    def __init__(self, *, capacity_bytes: int, max_share: float = DEFAULT_PINNED_SHARE) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"the pins' share of the capacity must be 0 to 1, not {max_share}")
        self._max_bytes = math.floor(capacity_bytes * max_share)
        self._sizes: dict[bytes, int] = {}
        self._bytes = 0

    @property
    def pinned_bytes(self) -> int:
        """Bytes of all pinned records."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._sizes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def pin(self, key: bytes, num_bytes: int) -> bool:
        """Whether the key is pinned now; False when the share is used up."""
        if key in self._sizes:
            return True
        if self._bytes + num_bytes > self._max_bytes:
            return False
        self._sizes[key] = num_bytes
        self._bytes += num_bytes
        return True

    def unpin(self, key: bytes) -> bool:
        """Whether the key was pinned."""
        num_bytes = self._sizes.pop(key, None)
        if num_bytes is None:
            return False
        self._bytes -= num_bytes
        return True

    def clear(self) -> None:
        """Ends every pin."""
        self._sizes.clear()
        self._bytes = 0
