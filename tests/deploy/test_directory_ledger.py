"""Members, leases and epochs, with a clock of the tests' own."""

import pytest

from kvferry.deploy.directory_epochs import RESERVED, EpochCounter
from kvferry.deploy.directory_ledger import MAX_MEMBERS, Ledger, Refused
from kvferry.deploy.members import Member, Members

LEASE_S = 3.0
TICK_S = 0.2


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Numbers:
    def __init__(self, last=0):
        self.last = last

    def next(self):
        self.last += 1
        return self.last

    def raise_to(self, epoch):
        self.last = max(self.last, epoch)


@pytest.fixture
def clock():
    return Clock()


def ledger(clock, *, last=0, settle_s=0.0):
    return Ledger(Numbers(last), lease_s=LEASE_S, settle_s=settle_s, clock=clock)


def member(name="one", *, address="h:1", roles=("decode",), epoch=0):
    return Member(address, roles, name, epoch)


def let_pass(book, clock, seconds):
    end = clock.now + seconds
    while clock.now < end - 1e-9:
        clock.now += TICK_S
        book.tick(interval_s=TICK_S)


def names(book):
    return [m.instance_id for m in book.members.members]


def test_a_member_stays_while_it_announces(clock):
    book = ledger(clock)
    epoch = book.announce(member()).epoch
    for _ in range(5):
        let_pass(book, clock, LEASE_S - 0.5)
        assert book.announce(member(epoch=epoch)) == (epoch, False)
    assert names(book) == ["one"]
    assert book.num_expired == 0


def test_a_silent_member_is_taken_off_and_loses_its_lease(clock):
    book = ledger(clock)
    old = book.announce(member()).epoch
    let_pass(book, clock, LEASE_S + 0.5)
    assert names(book) == []
    assert book.num_expired == 1
    epoch, lost = book.announce(member(epoch=old))
    assert lost
    assert epoch > old
    assert book.announce(member(epoch=epoch)) == (epoch, False)
    assert book.num_leases_lost == 1


def test_a_lost_first_answer_is_no_lost_lease(clock):
    book = ledger(clock)
    epoch = book.announce(member()).epoch
    assert book.announce(member(epoch=0)) == (epoch, False)


def test_who_left_does_not_come_back(clock):
    book = ledger(clock)
    epoch = book.announce(member()).epoch
    book.leave("one")
    assert names(book) == []
    with pytest.raises(Refused, match="has left"):
        book.announce(member(epoch=epoch))


def test_a_newer_process_at_an_address_replaces_the_older(clock):
    book = ledger(clock)
    old = book.announce(member("old")).epoch
    new = book.announce(member("new")).epoch
    assert names(book) == ["new"]
    with pytest.raises(Refused, match="newer"):
        book.announce(member("old", epoch=old))
    assert book.announce(member("new", epoch=new)) == (new, False)


def test_a_new_directory_takes_members_over_with_their_epochs(clock):
    book = ledger(clock, last=5, settle_s=5.0)
    assert book.announce(member(epoch=70)) == (70, False)
    assert book.announce(member("two", address="h:2")).epoch > 70
    assert not book.settled
    let_pass(book, clock, 1.0)
    version = book.version
    for _ in range(5):
        let_pass(book, clock, 1.0)
        book.announce(member(epoch=70))
    assert book.settled
    assert book.version > version  # watchers are told
    assert book.announce(member("three", address="h:3", epoch=60)).lease_lost


def test_a_new_directory_knows_whom_it_took_off_itself(clock):
    book = ledger(clock, settle_s=60.0)
    book.announce(member(epoch=70))
    let_pass(book, clock, LEASE_S + 0.5)
    assert not book.settled
    assert names(book) == []
    epoch, lost = book.announce(member(epoch=70))
    assert lost
    assert epoch > 70


def test_of_two_from_before_the_newer_has_the_address(clock):
    book = ledger(clock, settle_s=5.0)
    book.announce(member("new", epoch=9))
    with pytest.raises(Refused, match="newer"):
        book.announce(member("old", epoch=8))
    book = ledger(clock, settle_s=5.0)
    book.announce(member("old", epoch=8))
    book.announce(member("new", epoch=9))
    assert names(book) == ["new"]


def test_a_directory_that_was_stopped_takes_nobody_off(clock):
    book = ledger(clock, settle_s=2.0)
    epoch = book.announce(member()).epoch
    clock.now += 60
    book.tick(interval_s=TICK_S)
    assert names(book) == ["one"]
    assert not book.settled
    assert book.announce(member(epoch=epoch)) == (epoch, False)
    let_pass(book, clock, LEASE_S + 0.5)  # the control: now it was silent
    assert names(book) == []


def test_the_version_changes_with_the_members_only(clock):
    book = ledger(clock)
    epoch = book.announce(member()).epoch
    version = book.version
    book.announce(member(epoch=epoch))
    let_pass(book, clock, 1.0)
    book.leave("nobody")
    assert book.version == version
    book.announce(member(epoch=epoch, roles=("decode", "prefill")))
    assert book.version > version


def test_the_number_of_members_is_bounded(clock):
    book = ledger(clock)
    for i in range(MAX_MEMBERS):
        book.announce(member(str(i), address=f"h:{i + 1}"))
    with pytest.raises(Refused, match="full"):
        book.announce(member("more", address="h:9999"))


def test_epochs_grow_over_a_restart_and_a_clock_that_was_set_back(tmp_path, monkeypatch):
    path = tmp_path / "epochs"
    counter = EpochCounter(path)
    before = [counter.next() for _ in range(3 * RESERVED)]
    assert before == sorted(set(before))
    monkeypatch.setattr("time.time_ns", lambda: 1)
    again = EpochCounter(path)
    assert again.next() > before[-1]
    again.raise_to(10 * before[-1])
    assert EpochCounter(path).next() > 10 * before[-1]


def test_a_state_file_that_is_none(tmp_path):
    path = tmp_path / "epochs"
    path.write_text("12 apples")
    with pytest.raises(ValueError, match="one number"):
        EpochCounter(path)


@pytest.mark.parametrize("fields", [{"address": "nowhere"}, {"roles": ()}, {"roles": ("cook",)}])
def test_what_is_no_member(fields):
    with pytest.raises(ValueError, match=r"host:port|roles"):
        member(**fields)


def test_addresses_by_role():
    members = Members((member("a", address="h:1"), member("b", address="h:2", roles=("store",))))
    assert members.addresses("decode") == ("h:1",)
    assert members.with_roles(["store"]).addresses("store") == ("h:2",)
    assert members.updated([member("c", address="h:1", roles=("prefill",))]).addresses("decode") == ()
