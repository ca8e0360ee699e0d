"""The directory over real sockets: who announces, who watches, and a directory that goes away and comes back."""

import asyncio
import re
import urllib.request
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvferry.deploy.directory_client import DirectoryMembership, Registration, list_members
from kvferry.deploy.directory_server import DirectoryConfig, DirectoryServer
from kvferry.deploy.members import Member, Members
from kvferry.deploy.membership import StaticMembership
from kvferry.deploy.scrape_targets import scrape_targets
from kvferry.kvstore.metrics_endpoint import MetricsPlace
from kvferry.proto import directory_pb2, directory_pb2_grpc

LIMIT_S = 20.0


class Town:
    """A directory, and what uses it; the fixture stops all of it."""

    def __init__(self, stack, state):
        self._stack = stack
        self._state = state
        self.port = 0
        self.server = None

    async def open(self, **config):
        config = {"lease_s": 1.0, "settle_s": 2.0, "state": self._state, **config}
        self.server = DirectoryServer(DirectoryConfig(port=self.port, **config))
        self.address = await self.server.start()
        self.port = int(self.address.rpartition(":")[2])
        self._stack.push_async_callback(self.server.stop)

    async def close(self):
        await self.server.stop(0)

    def register(self, address, *roles, **options):
        registration = Registration(self.address, address=address, roles=roles, **options)
        registration.start()
        self._stack.push_async_callback(registration.leave)
        return registration

    async def joined(self, address, *roles, **options):
        registration = self.register(address, *roles, **options)
        async with asyncio.timeout(LIMIT_S):
            await registration.registered.wait()
        return registration

    async def watch(self, *roles):
        watcher = Watcher(DirectoryMembership(self.address, roles=roles))
        self._stack.push_async_callback(watcher.stop)
        return watcher


class Watcher:
    def __init__(self, membership):
        self.membership = membership
        self.seen = []
        self._task = asyncio.create_task(self._watch())

    async def _watch(self):
        async with aclosing(self.membership.watch()) as lists:
            async for members in lists:
                self.seen.append(sorted(m.address for m in members.members))

    async def until(self, *addresses):
        async with asyncio.timeout(LIMIT_S):
            while not self.seen or self.seen[-1] != sorted(addresses):
                await asyncio.sleep(0.01)

    async def stop(self):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.membership.close()


@pytest.fixture
async def town(tmp_path):
    async with AsyncExitStack() as stack:
        town = Town(stack, tmp_path / "epochs")
        await town.open()
        yield town


async def test_members_join_and_leave(town):
    everybody, stores = await town.watch(), await town.watch("store")
    await everybody.until()
    one = await town.joined("127.0.0.1:1", "decode")
    two = await town.joined("127.0.0.1:2", "store")
    assert 0 < one.epoch < two.epoch
    await everybody.until("127.0.0.1:1", "127.0.0.1:2")
    await stores.until("127.0.0.1:2")
    await one.leave()
    await everybody.until("127.0.0.1:2")
    listed = await list_members(town.address)
    assert [(m.address, m.roles, m.epoch) for m in listed.members] == [("127.0.0.1:2", ("store",), two.epoch)]
    assert [["127.0.0.1:1"]] not in stores.seen


async def test_the_directory_goes_away_and_comes_back(town):
    """Nobody is forgotten, no lease is lost, and epochs stay."""
    watcher = await town.watch()
    lost = []
    members = [await town.joined(f"127.0.0.1:{i}", "decode", on_lease_lost=lambda: lost.append(1)) for i in (1, 2, 3)]
    epochs = [member.epoch for member in members]
    await watcher.until("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
    await town.close()
    async with asyncio.timeout(LIMIT_S):
        while any(member.registered.is_set() for member in members):
            await asyncio.sleep(0.01)
    told = len(watcher.seen)
    await town.open()
    for member in members:
        async with asyncio.timeout(LIMIT_S):
            await member.registered.wait()
    async with asyncio.timeout(LIMIT_S):
        while not town.server.ledger.settled:
            await asyncio.sleep(0.01)
    newcomer = await town.joined("127.0.0.1:4", "decode")
    await watcher.until("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:4")
    assert [member.epoch for member in members] == epochs
    assert newcomer.epoch > max(epochs)
    assert not lost
    assert all(len(addresses) >= 3 for addresses in watcher.seen[told:])


async def test_who_does_not_come_back_with_the_directory_is_taken_off(town):
    watcher = await town.watch()
    await town.joined("127.0.0.1:1", "decode")
    gone = await town.joined("127.0.0.1:2", "decode")
    await watcher.until("127.0.0.1:1", "127.0.0.1:2")
    await town.close()
    gone._task.cancel()
    await town.open()
    await watcher.until("127.0.0.1:1")
    assert town.server.ledger.settled


async def test_a_member_that_was_silent_learns_that_its_lease_was_lost(town):
    await town.close()
    await town.open(settle_s=0.0)
    lost = []
    member = await town.joined("127.0.0.1:1", "decode", on_lease_lost=lambda: lost.append(1))
    epoch = member.epoch
    member._task.cancel()
    async with asyncio.timeout(LIMIT_S):
        while town.server.ledger.members.members:
            await asyncio.sleep(0.01)
    assert not lost
    member._task = asyncio.create_task(member._announce_forever())
    async with asyncio.timeout(LIMIT_S):
        while not lost:
            await asyncio.sleep(0.01)
    assert member.epoch > epoch
    assert member.num_leases_lost == 1


async def test_a_member_may_start_before_the_directory(town):
    await town.close()
    early = town.register("127.0.0.1:1", "decode")
    await asyncio.sleep(0.3)
    assert not early.registered.is_set()
    await town.open()
    async with asyncio.timeout(LIMIT_S):
        await early.registered.wait()


@pytest.mark.parametrize(
    "member",
    [
        directory_pb2.Member(address="127.0.0.1:1", roles=["decode"]),
        directory_pb2.Member(address="nowhere", roles=["decode"], instance_id="a"),
        directory_pb2.Member(address="127.0.0.1:1", roles=["cook"], instance_id="a"),
        directory_pb2.Member(address="127.0.0.1:1", instance_id="a"),
        directory_pb2.Member(address="127.0.0.1:1", roles=["decode"], instance_id="a" * 257),
    ],
    ids=["instance", "address", "role", "roles", "length"],
)
async def test_bad_announcements_are_refused(town, member):
    async with grpc.aio.insecure_channel(town.address) as channel:
        stub = directory_pb2_grpc.DirectoryStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Announce(directory_pb2.AnnounceRequest(member=member))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not town.server.ledger.members.members


async def test_watchers_are_bounded_and_counted_out(town):
    await town.close()
    await town.open(max_watchers=1)
    async with grpc.aio.insecure_channel(town.address) as channel:
        stub = directory_pb2_grpc.DirectoryStub(channel)
        first = stub.Watch(directory_pb2.WatchRequest())
        await first.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Watch(directory_pb2.WatchRequest()).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
        async with asyncio.timeout(LIMIT_S):
            while town.server._servicer.num_watchers:
                await asyncio.sleep(0.01)


async def test_nobody_at_the_address():
    with pytest.raises(OSError, match="no directory answers"):
        await list_members("127.0.0.1:1", timeout_s=1.0)


async def test_fixed_members():
    membership = StaticMembership.of(decode=["127.0.0.1:1"], prefill=["127.0.0.1:2"])
    [members] = [members async for members in membership.watch()]
    assert (members.addresses("decode"), members.addresses("prefill")) == (("127.0.0.1:1",), ("127.0.0.1:2",))
    with pytest.raises(ValueError, match="host:port"):
        StaticMembership.of(decode=["here"])


async def test_a_gateway_follows_the_directory(lab, town):
    """A worker is used when it has joined; one that left is not, and what it is doing goes on to its end."""
    old, new = await lab.worker([5, 0.5, lab.end(1)]), await lab.worker([lab.end(0)])
    gateway = await lab.gateway([], membership=DirectoryMembership(town.address), serving=False)
    leaving = await town.joined(old.address, "prefill", "decode")
    await gateway.wait_until_serving(LIMIT_S)
    stub = await lab.stub(gateway)
    running = stub.Generate(lab.request())
    await lab.first(running)
    await town.joined(new.address, "prefill", "decode")
    await leaving.leave()
    await lab.eventually(lambda: list(gateway._pool._workers) == [new.address])
    assert len([chunk async for chunk in running]) == 1
    assert [chunk async for chunk in stub.Generate(lab.request())]
    assert len(new.requests) == 1
    await lab.eventually(lambda: not gateway._pool._leaving)


async def test_metrics(town):
    """What it tells is what happened, and every name is documented."""
    await town.close()
    await town.open(metrics=MetricsPlace(), settle_s=0.0)
    await town.joined("127.0.0.1:7001", "prefill", "decode")
    silent = await town.joined("127.0.0.1:7002", "store")
    watcher = await town.watch()
    await watcher.until("127.0.0.1:7001", "127.0.0.1:7002")
    silent._task.cancel()
    await watcher.until("127.0.0.1:7001")

    def scrape():
        url = f"http://127.0.0.1:{town.server.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=LIMIT_S) as reply:
            return list(text_string_to_metric_families(reply.read().decode()))

    families = [family for family in await asyncio.to_thread(scrape) if family.name.startswith("kvferry_")]
    told = {(s.name, s.labels.get("role", "")): s.value for family in families for s in family.samples}
    assert told == {
        ("kvferry_directory_members", "prefill"): 1,
        ("kvferry_directory_members", "decode"): 1,
        ("kvferry_directory_members", "store"): 0,
        ("kvferry_directory_members", "gateway"): 0,
        ("kvferry_directory_watchers", ""): 1,
        ("kvferry_directory_settled", ""): 1,
        ("kvferry_directory_leases_ended_total", ""): 1,
        ("kvferry_directory_leases_lost_total", ""): 0,
        ("kvferry_calls_unauthenticated_total", ""): 0,
    }
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    assert {name for name, _ in told if "directory" in name} == set(
        re.findall(r"^\| `(kvferry_directory_\w+)`", page, re.MULTILINE)
    )


def test_scrape_targets():
    members = Members(
        (
            Member("10.0.0.2:7610", ("prefill",)),
            Member("10.0.0.3:7610", ("prefill",)),
            Member("10.0.0.4:7650", ("prefill", "decode")),
            Member("10.0.0.5:65000", ("gateway",)),
        )
    )
    assert scrape_targets("10.0.0.1:7590", members, port_offset=1000) == [
        {"targets": ["10.0.0.1:8590"], "labels": {"job": "kvferry-directory"}},
        {"targets": ["10.0.0.2:8610", "10.0.0.3:8610"], "labels": {"job": "kvferry-prefill"}},
        {"targets": ["10.0.0.4:8650"], "labels": {"job": "kvferry-both"}},
    ]
