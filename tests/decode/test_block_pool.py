"""The block pool against a dict of owners, under allocate, share, publish and release in any order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry.decode.block_pool import BlockPool, OutOfBlocks

_NUM_BLOCKS = 7
_KEYS = [bytes([number]) * 32 for number in range(6)]


class _Model(RuleBasedStateMachine):
    """Holds block ids as sequences do: in lists, which are released as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped: list[int] = []
        self.pool = BlockPool(_NUM_BLOCKS, on_drop=self.dropped.append)
        self.held: list[list[int]] = []
        self.key_of: dict[int, bytes] = {}
        self.cached: list[int] = []  # unused blocks with a key, oldest first

    def _used(self) -> set[int]:
        return {block_id for ids in self.held for block_id in ids}

    def _free(self) -> set[int]:
        return set(range(_NUM_BLOCKS)) - self._used() - set(self.cached)

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        free = self._free()
        if count > len(free) + len(self.cached):
            with pytest.raises(OutOfBlocks, match=f"{count} blocks wanted"):
                self.pool.allocate(range(count))
            return
        taken = self.pool.allocate(range(count))
        assert len(set(taken)) == len(taken) == count
        num_free = min(count, len(free))
        evicted = self.cached[: count - num_free]
        assert set(taken[:num_free]) <= free  # nothing is evicted while a block is free
        assert taken[num_free:] == evicted == self._take_dropped()
        for block_id in evicted:
            self.cached.remove(block_id)
            del self.key_of[block_id]
        self.held.append(taken)

    @rule(key=st.sampled_from(_KEYS))
    def share(self, key: bytes) -> None:
        expected = next((block_id for block_id, k in self.key_of.items() if k == key), None)
        assert self.pool.share(key) == expected
        if expected is not None:
            if expected in self.cached:
                self.cached.remove(expected)
            self.held.append([expected])

    @precondition(lambda self: self._used())
    @rule(data=st.data(), key=st.sampled_from(_KEYS))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        block_id = data.draw(st.sampled_from(sorted(self._used())))
        self.pool.publish(block_id, key)
        if key not in self.key_of.values():
            self.key_of.setdefault(block_id, key)

    @precondition(lambda self: len(self.held) > 1)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        """One holder takes over another's blocks: a sequence of shared and fresh ones."""
        ids = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.held[data.draw(st.integers(0, len(self.held) - 1))] += ids

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ids = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self._release(ids)

    def _release(self, ids: list[int]) -> None:
        self.pool.release(list(ids))
        # From the end; a block that is in the list twice becomes unused with its first mention.
        for block_id in reversed(dict.fromkeys(ids)):
            if block_id in self.key_of and block_id not in self._used():
                self.cached.append(block_id)
        assert set(self._take_dropped()) == set(ids) - self._used() - set(self.cached)

    def _take_dropped(self) -> list[int]:
        """Blocks whose content was given up since the last look, each told once."""
        dropped = self.dropped.copy()
        self.dropped.clear()
        assert len(set(dropped)) == len(dropped)
        return dropped

    @invariant()
    def same_counts(self) -> None:
        self.pool.check_integrity()
        assert not self.dropped
        assert self.pool.num_used == len(self._used())
        assert self.pool.num_available == _NUM_BLOCKS - len(self._used())

    def teardown(self) -> None:
        """Nothing was lost, and the cached blocks go in the order of the model."""
        while self.held:
            self._release(self.held.pop())
        num_free = len(self._free())
        taken = self.pool.allocate(range(_NUM_BLOCKS))
        assert sorted(taken) == list(range(_NUM_BLOCKS))
        assert taken[num_free:] == self.cached
        assert all(self.pool.share(key) is None for key in _KEYS)
        self.pool.check_integrity()


_Model.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestModel = _Model.TestCase


def chain(pool: BlockPool, keys: list[bytes]) -> list[int]:
    """Blocks under `keys`, used."""
    block_ids = pool.allocate(range(len(keys)))
    for block_id, key in zip(block_ids, keys, strict=True):
        pool.publish(block_id, key)
    return block_ids


def found(pool: BlockPool, keys: list[bytes]) -> list[bool]:
    """Which keys have a block. Uses none of them: the order of eviction changes, though."""
    shared = [pool.share(key) for key in keys]
    pool.release([block_id for block_id in shared if block_id is not None])
    return [block_id is not None for block_id in shared]


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_a_chain_is_evicted_from_its_end(wanted: int) -> None:
    pool = BlockPool(4)
    pool.release(chain(pool, _KEYS[:4]))
    pool.allocate(range(wanted))
    assert found(pool, _KEYS[:4]) == [index < 4 - wanted for index in range(4)]


def test_the_chain_that_was_used_last_stays() -> None:
    pool = BlockPool(4)
    old, new = chain(pool, _KEYS[:2]), chain(pool, _KEYS[2:4])
    pool.release(old)
    pool.release(new)
    pool.release([pool.share(key) for key in _KEYS[:2]])  # type: ignore[misc]  # `old` is the newer one now
    assert pool.allocate(range(2)) == [new[1], new[0]]
    assert found(pool, _KEYS[:4]) == [True, True, False, False]


def test_free_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(3)
    pool.release(chain(pool, _KEYS[:1]))
    pool.allocate(range(2))
    assert found(pool, _KEYS[:1]) == [True]


def test_out_of_blocks_takes_nothing() -> None:
    pool = BlockPool(4)
    held = pool.allocate(range(1))
    pool.release(chain(pool, _KEYS[:2]))
    with pytest.raises(OutOfBlocks, match="4 blocks wanted, 3 available"):
        pool.allocate(range(4))
    pool.check_integrity()
    assert (pool.num_used, pool.num_available) == (1, 3)
    assert found(pool, _KEYS[:2]) == [True, True]
    assert set(pool.allocate(range(3))).isdisjoint(held)


def test_a_used_block_is_never_evicted() -> None:
    pool = BlockPool(3)
    block_ids = chain(pool, _KEYS[:3])
    pool.release(block_ids)
    assert pool.share(_KEYS[2]) == block_ids[2]  # the one that would go first
    assert pool.share(_KEYS[2]) == block_ids[2]
    assert set(pool.allocate(range(2))) == {block_ids[0], block_ids[1]}
    with pytest.raises(OutOfBlocks):
        pool.allocate(range(1))
    pool.release([block_ids[2]])
    with pytest.raises(OutOfBlocks):  # the other user still has it
        pool.allocate(range(1))
    pool.release([block_ids[2]])
    assert pool.allocate(range(1)) == [block_ids[2]]


def test_the_first_block_under_a_key_stays() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(range(2))
    pool.publish(first, _KEYS[0])
    pool.publish(second, _KEYS[0])
    assert pool.share(_KEYS[0]) == first
    pool.release([first, first, second])
    assert pool.allocate(range(2)) == [second, first]  # the second one has no key, so it is free and goes before


def test_a_block_keeps_its_key() -> None:
    pool = BlockPool(1)
    [block_id] = pool.allocate(range(1))
    pool.publish(block_id, _KEYS[0])
    pool.publish(block_id, _KEYS[1])
    assert pool.share(_KEYS[1]) is None
    assert pool.share(_KEYS[0]) == block_id
    pool.check_integrity()


def test_a_block_that_nobody_uses_cannot_be_published_or_released() -> None:
    pool = BlockPool(2)
    [block_id] = pool.allocate(range(1))
    pool.release([block_id])
    with pytest.raises(AssertionError):
        pool.publish(block_id, _KEYS[0])
    with pytest.raises(KeyError):
        pool.release([block_id])
    pool.check_integrity()
    assert pool.num_available == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._free[0].append(pool._free[0][0]),
        lambda pool: pool._free[0].append(0),  # used
        lambda pool: pool._free[0].pop(),
        lambda pool: pool._free[0].append(2),  # evictable
        lambda pool: pool._evictable[0].update({0: None}),  # used
        lambda pool: pool._evictable[0].pop(2),
        lambda pool: pool._ref_counts.pop(0),
        lambda pool: pool._ref_counts.update({0: 0}),
        lambda pool: pool._key_of_id.pop(2),
        lambda pool: pool._id_of_key.pop(_KEYS[1]),
        lambda pool: pool._id_of_key.update({_KEYS[1]: 0}),
        lambda pool: (pool._key_of_id.update({3: _KEYS[5]}), pool._id_of_key.update({_KEYS[5]: 3})),  # free
        lambda pool: (pool._key_of_id.pop(2), pool._id_of_key.pop(_KEYS[1])),
    ],
)
def test_check_integrity_sees_damage(damage: Callable[[BlockPool], object]) -> None:
    pool = BlockPool(5)
    used = chain(pool, _KEYS[:1])
    plain = pool.allocate(range(1))
    pool.release(chain(pool, _KEYS[1:2]))
    pool.check_integrity()
    assert (used, plain, list(pool._evictable[0]), list(pool._free[0])) == ([0], [1], [2], [3, 4])
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()


def test_blocks_of_several_devices() -> None:
    """Each device has its own room, and evicts its own blocks only."""
    pool = BlockPool(6, num_shares=2)
    held = pool.allocate(range(3))
    assert [block_id % 2 for block_id in held] == [0, 1, 0]
    assert pool.has_room([1, 3, 0]) and not pool.has_room([0, 2])
    assert pool.has_room([0, 2], given_back=held[:1]) and not pool.has_room([0, 2], given_back=held[1:2])
    with pytest.raises(OutOfBlocks):
        pool.allocate([1, 0, 2])
    assert pool.num_available == 3
    for block_id, key in zip(held, _KEYS, strict=False):
        pool.publish(block_id, key)
    pool.release(held)
    pool.check_integrity()
    rest = pool.allocate([1, 3, 5])
    assert [pool.share(key) for key in _KEYS[:3]] == [held[0], None, held[2]]
    pool.release(rest)
    pool.check_integrity()
    assert (pool.largest_share(range(7)), pool.share_blocks) == (4, 3)
