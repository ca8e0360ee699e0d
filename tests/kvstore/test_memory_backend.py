"""The memory backend against a dict with a list of uses, under random puts, leases and evictions."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry.kvstore import MemoryBackend, StoreFull
from kvferry.kvstore.lease import LeaseTable
from kvferry.kvstore.memory_backend import ENTRY_OVERHEAD_BYTES

_T = TypeVar("_T")

_KEYS = [bytes([number]) * 32 for number in range(12)]
_CAPACITY = 6 * (ENTRY_OVERHEAD_BYTES + 100)


def _run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine that must not suspend: that is what makes it atomic."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise AssertionError("the memory backend suspended")


def _cost(record: bytes) -> int:
    return len(record) + ENTRY_OVERHEAD_BYTES


class _Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.leases = LeaseTable(max_leases=4, max_keys=20, clock=lambda: self.now)
        self.backend = MemoryBackend(capacity_bytes=_CAPACITY, leases=self.leases)
        self.records: dict[bytes, bytes] = {}  # in order of use, oldest first
        self.held: dict[int, tuple[list[bytes], float]] = {}
        self.evictions = 0

    def _pinned(self) -> set[bytes]:
        return {key for keys, until in self.held.values() if until > self.now for key in keys}

    def _bytes(self) -> int:
        return sum(map(_cost, self.records.values()))

    @rule(key=st.sampled_from(_KEYS), size=st.integers(0, 400), fill=st.integers(0, 255))
    def put(self, key: bytes, size: int, fill: int) -> None:
        record = bytes([fill]) * size
        if key in self.records:
            assert _run(self.backend.put(key, record)) is False
            return
        victims: list[bytes] = []
        missing = self._bytes() + _cost(record) - _CAPACITY
        for candidate, old in self.records.items():
            if missing > 0 and candidate not in self._pinned():
                victims.append(candidate)
                missing -= _cost(old)
        if missing > 0:
            with pytest.raises(StoreFull):
                _run(self.backend.put(key, record))
            return
        assert _run(self.backend.put(key, record)) is True
        for victim in victims:
            del self.records[victim]
        self.evictions += len(victims)
        self.records[key] = record

    @rule(keys=st.lists(st.sampled_from(_KEYS), min_size=1, max_size=5))
    def get(self, keys: list[bytes]) -> None:
        assert _run(self.backend.get(keys)) == [self.records.get(key) for key in keys]

    @rule(keys=st.lists(st.sampled_from(_KEYS), min_size=1, max_size=5))
    def contains(self, keys: list[bytes]) -> None:
        assert _run(self.backend.contains(keys)) == [key in self.records for key in keys]
        for key in reversed(keys):
            if key in self.records:
                self.records[key] = self.records.pop(key)

    @rule(keys=st.lists(st.sampled_from(_KEYS), min_size=1, max_size=3))
    def delete(self, keys: list[bytes]) -> None:
        count = len(set(keys) & set(self.records))
        assert _run(self.backend.delete(keys)) == count
        for key in keys:
            self.records.pop(key, None)

    @precondition(lambda self: len(self.records) > 4)
    @rule()
    def flush(self) -> None:
        assert _run(self.backend.delete(None)) == len(self.records)
        self.records.clear()

    @rule(keys=st.lists(st.sampled_from(_KEYS), min_size=1, max_size=4), duration=st.integers(1, 5))
    def lease(self, keys: list[bytes], duration: int) -> None:
        lease_id = self.leases.grant(keys, duration)
        alive = [held for held, until in self.held.values() if until > self.now]
        if len(alive) >= 4 or sum(map(len, alive)) + len(keys) > 20:
            assert lease_id == 0
        else:
            assert lease_id != 0
            self.held[lease_id] = (keys, self.now + duration)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(list(self.held)))
        _, until = self.held.pop(lease_id)
        assert self.leases.release(lease_id) is (until > self.now)

    @rule(seconds=st.integers(0, 3))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @invariant()
    def same_bytes(self) -> None:
        stats = _run(self.backend.stats())
        assert stats.records == len(self.records)
        assert stats.bytes == self._bytes() <= _CAPACITY
        assert stats.evictions == self.evictions
        assert _run(self.backend.get(_KEYS)) == [self.records.get(key) for key in _KEYS]
        pinned = self._pinned()
        assert all(self.leases.is_pinned(key) is (key in pinned) for key in _KEYS)


_Model.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestModel = _Model.TestCase


def test_a_chain_loses_its_end_first() -> None:
    backend = MemoryBackend(capacity_bytes=_CAPACITY)
    for key in _KEYS[:6]:
        assert _run(backend.put(key, bytes(100)))
    _run(backend.contains(_KEYS[:6]))
    for count, key in enumerate(_KEYS[6:9], start=1):
        assert _run(backend.put(key, bytes(100)))
        assert _run(backend.get(_KEYS[:6])).count(None) == count
        assert None not in _run(backend.get(_KEYS[: 6 - count]))


def test_a_record_that_can_never_fit_evicts_nothing() -> None:
    backend = MemoryBackend(capacity_bytes=_CAPACITY)
    _run(backend.put(_KEYS[0], b"record"))
    with pytest.raises(StoreFull, match="more memory"):
        _run(backend.put(_KEYS[1], bytes(_CAPACITY)))
    assert _run(backend.get(_KEYS[:1])) == [b"record"]


def test_hands_out_the_stored_object() -> None:
    backend = MemoryBackend(capacity_bytes=_CAPACITY)
    record = bytes(100)
    _run(backend.put(_KEYS[0], record))
    assert _run(backend.get(_KEYS[:1]))[0] is record


def test_capacity_must_be_positive() -> None:
    with pytest.raises(ValueError):
        MemoryBackend(capacity_bytes=0)
