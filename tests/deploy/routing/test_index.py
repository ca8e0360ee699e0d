"""The approximate prefix index: who holds what, and its bounds."""

import random
import tracemalloc

import pytest

from kvferry.deploy.routing.index import ENTRY_BYTES, NOTHING, STORE, PrefixIndex


def chain(name, num_blocks=8):
    """Keys that look like a chain's: blocks with equal keys have equal beginnings."""
    return [f"{name}-{i}".encode().rjust(32, b".")[::-1] for i in range(num_blocks)]


@pytest.fixture
def index():
    return PrefixIndex(capacity_bytes=10_000_000, ttl_s=60.0)


class TestIndex:
    def test_depths(self, index):
        keys, a, b = chain("x"), index.slot("a", 0), index.slot("b", 0)
        index.record(keys, [STORE], 0)
        index.record(keys[:5], [a], 0)
        index.record(keys[:2], [b], 0)
        found = index.find(keys, 1)
        assert [found.depth(slot) for slot in (STORE, a, b, b + 1)] == [8, 5, 2, 0]
        assert found.deepest(10) == [a, b]
        assert found.deepest(1) == [a]
        assert index.find(keys[:3], 1).depth(a) == 3
        assert index.find(chain("y"), 1) is NOTHING

    def test_a_gap_ends_what_is_held(self, index):
        keys, a = chain("x"), index.slot("a", 0)
        index.record(keys, [STORE], 0)
        index.record(keys[:2], [a], 0)
        index.record(keys[4:], [a], 0)
        assert index.find(keys, 1).depth(a) == 2

    def test_holdings_expire_and_are_renewed(self, index):
        keys, a = chain("x"), index.slot("a", 0)
        index.record(keys, [a], 0)
        assert index.find(keys, 31).depth(a) == 8  # at least half the time
        index.record(keys[:3], [STORE], 31)
        assert index.find(keys, 59).depth(a) == 8  # another's news renew nothing
        assert index.find(keys, 61).depth(a) == 0
        assert index.find(keys, 61).depth(STORE) == 3

    def test_places_that_come_and_go(self, index):
        keys, old = chain("x"), index.slot("a", 0)
        index.record(keys, [old], 0)
        index.forget_place("a", 1)
        assert index.find(keys, 2).depth(index.slot("a", 2)) == 0
        assert index.slot("b", 3) not in (old, STORE)
        assert index.slot("c", 100) == old  # all that was known of it has expired
        assert index.find(keys, 100).depth(old) == 0

    def test_least_recently_used_goes_first_and_the_end_before_the_beginning(self):
        index = PrefixIndex(capacity_bytes=20 * ENTRY_BYTES, ttl_s=60.0)
        first, second, third = chain("x"), chain("y"), chain("z")
        index.record(first, [STORE], 0)
        index.record(second, [STORE], 0)
        index.find(first, 0)
        index.record(third, [STORE], 0)
        assert [index.find(keys, 0).depth(STORE) for keys in (first, second, third)] == [8, 4, 8]
        assert index.num_bytes <= 20 * ENTRY_BYTES

    def test_against_a_plain_model(self):
        """Random records and questions; without expiry and eviction the index is exact."""
        rng = random.Random(3)
        index, model = PrefixIndex(capacity_bytes=10**8, ttl_s=1e9), {}
        chains = [chain(f"c{i % 4}", 4) + chain(f"d{i}", 6) for i in range(12)]
        slots = [STORE, *(index.slot(f"w{i}", 0) for i in range(5))]
        for _ in range(300):
            keys = rng.choice(chains)[: rng.randint(1, 10)]
            if rng.random() < 0.5:
                slot = rng.choice(slots)
                index.record(keys, [slot], 0)
                model.setdefault(slot, set()).update(keys)
            else:
                found = index.find(keys, 0)
                for slot in slots:
                    held = model.get(slot, set())
                    expected = next((i for i, key in enumerate(keys) if key not in held), len(keys))
                    assert found.depth(slot) == expected

    def test_memory_is_less_than_it_says(self):
        """10,000 blocks, 200 places."""
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            index = PrefixIndex(capacity_bytes=10**9, ttl_s=60.0)
            slots = [index.slot(f"w{i}", 0) for i in range(200)]
            for i in range(1250):
                index.record(chain(f"{i}"), [STORE, *slots], 0)
                index.record(chain(f"{i}"), [STORE, *slots], 31)
            taken = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert len(index) == 10_000
        assert taken <= index.num_bytes <= 2 * taken
