"""Leases on a clock that the test holds."""

from __future__ import annotations

from kvferry.kvstore.lease import LeaseTable


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


_A, _B, _C = (bytes([number]) * 32 for number in (1, 2, 3))


def _table(**limits: int) -> tuple[LeaseTable, _Clock]:
    clock = _Clock()
    return LeaseTable(clock=clock, **limits), clock


def test_pins_until_it_expires() -> None:
    table, clock = _table()
    lease_id = table.grant([_A, _B], 5.0)
    assert lease_id != 0
    assert table.is_pinned(_A) and table.is_pinned(_B) and not table.is_pinned(_C)
    clock.now += 4.999
    assert table.is_pinned(_A)
    clock.now += 0.001
    assert not table.is_pinned(_A)
    assert len(table) == 0
    assert not table.renew(lease_id)
    assert not table.release(lease_id)


def test_renew_starts_the_duration_again() -> None:
    table, clock = _table()
    lease_id = table.grant([_A], 5.0)
    for _ in range(10):
        clock.now += 4.0
        assert table.renew(lease_id)
    assert table.is_pinned(_A)
    clock.now += 5.0
    assert not table.is_pinned(_A)


def test_release_ends_it_at_once() -> None:
    table, _ = _table()
    lease_id = table.grant([_A], 5.0)
    assert table.release(lease_id)
    assert not table.is_pinned(_A)
    assert not table.release(lease_id)
    assert not table.release(12345)


def test_two_leases_on_one_key() -> None:
    table, clock = _table()
    short, long = table.grant([_A], 1.0), table.grant([_A, _A], 2.0)
    assert short != long
    clock.now += 1.0
    assert table.is_pinned(_A)
    table.release(long)
    assert not table.is_pinned(_A)


def test_narrow_keeps_the_first_keys() -> None:
    table, _ = _table(max_keys=3)
    lease_id = table.grant([_A, _B, _C], 5.0)
    table.narrow(lease_id, 1)
    assert table.is_pinned(_A) and not table.is_pinned(_B) and not table.is_pinned(_C)
    assert table.grant([_B, _C], 5.0) != 0, "narrowing gives the room back"
    table.narrow(lease_id, 0)
    assert not table.is_pinned(_A)
    table.narrow(999, 1)


def test_nothing_to_lease() -> None:
    table, _ = _table()
    assert table.grant([], 5.0) == 0
    assert table.grant([_A], 0.0) == 0
    assert len(table) == 0


def test_bounded_in_leases_and_keys() -> None:
    table, clock = _table(max_leases=2, max_keys=3)
    assert table.grant([_A, _B, _C], 5.0) and not table.grant([_A], 5.0), "three keys at most"
    clock.now += 5.0
    assert table.grant([_A], 5.0) and table.grant([_A], 5.0)
    assert not table.grant([_A], 5.0), "two leases at most"
    clock.now += 5.0
    assert table.grant([_A], 5.0), "expired ones make room"


def test_many_short_leases_leave_nothing() -> None:
    table, clock = _table()
    for _ in range(3000):
        lease_id = table.grant([_A, _B], 60.0)
        table.renew(lease_id)
        table.release(lease_id)
    assert len(table) == 0
    assert len(table._expiries) < 200
    clock.now += 61.0
    assert not table.is_pinned(_A)
    assert not table._pins and table._num_keys == 0
