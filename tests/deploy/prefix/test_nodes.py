"""`kvferry prefix` with several store nodes, its pins and its listing of nodes. The chain comes from a bundle."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.bundles import record_of, small_chain, write_bundle
from support.processes import NodeProcess
from typer.testing import CliRunner

from kvferry.deploy.cli import app
from kvferry.deploy.prefix.stores import Nodes
from kvferry.kvstore.bundle_chain import Chain
from kvferry.kvstore.bundle_transfer import num_stored
from kvferry.kvstore.placement import ranked, run_keys


def run(*arguments: object, ok: bool = True) -> str:
    result = CliRunner().invoke(app, ["prefix", *map(str, arguments)])
    assert result.exit_code == (0 if ok else 1), result.output
    assert "Traceback" not in result.output
    return result.output


@dataclass
class Lab:
    chain: Chain
    bundle: Path
    addresses: list[str]

    @property
    def stores(self) -> list[str]:
        return [word for address in self.addresses for word in ("--store", address)]

    def fill(self, *, replication: int = 1, num_bytes: int = 70) -> None:
        async def put() -> None:
            async with Nodes(self.addresses, replication).open() as store:
                placed = store.of_chain(self.chain.keys)
                for index, key in enumerate(self.chain.keys):
                    assert await placed.put(key, record_of(self.chain, index, num_bytes))

        asyncio.run(put())

    def held(self, addresses: list[str]) -> int:
        async def count() -> int:
            async with Nodes(addresses).open() as store:
                return await num_stored(store, self.chain)

        return asyncio.run(count())


@pytest.fixture
def lab(tmp_path: Path, start_node: Callable[..., NodeProcess]) -> Lab:
    chain = small_chain(20)
    nodes = [start_node("--memory", "16MiB") for _ in range(3)]
    return Lab(chain, write_bundle(tmp_path / "bundle", chain), [node.address for node in nodes])


def test_a_listing_of_nodes_shows_where_records_are(lab: Lab) -> None:
    lab.fill()
    said = run("list", *lab.stores)
    by_node = dict(zip(lab.addresses, re.split(r"127\.0\.0\.1:\d+: ", said)[1:], strict=True))
    for key, first in zip(lab.chain.keys, run_keys(lab.chain.keys), strict=True):
        home = ranked(first, lab.addresses)[0]
        assert [address for address, lines in by_node.items() if key.hex() in lines] == [home]
    index = 19
    assert f"{lab.chain.keys[index].hex()} block {index}, 32 tokens" in said
    assert sum(int(number) for number in re.findall(r"memory, (\d+) records", said)) == 20
    assert said.count("\n") == 3 + 20
    limited = run("list", *lab.stores, "--limit", 1)
    num_in_use = len({ranked(first, lab.addresses)[0] for first in run_keys(lab.chain.keys)})
    assert limited.count("\n") == 3 + 2 * num_in_use
    assert "--limit 1; 0 lists all" in limited
    lost = run("list", *lab.stores, "--store", "127.0.0.1:1", ok=False)
    assert "1 of 4 nodes did not answer" in lost
    assert lab.chain.keys[0].hex() in lost


def test_pin_and_unpin(lab: Lab) -> None:
    chain_of = ["--chain-of", lab.bundle, *lab.stores]
    lab.fill(replication=2)
    assert run("pin", *chain_of) == "all 20 blocks are pinned\n"
    assert run("list", *lab.stores).count(", pinned\n") == 40  # both copies
    until = lab.chain.keys[4].hex()
    assert run("unpin", *chain_of, "--until", until) == "5 of 5 blocks were pinned and no longer are\n"
    assert run("unpin", *chain_of) == "15 of 20 blocks were pinned and no longer are\n"
    assert "pinned" not in run("list", *lab.stores)
    run("rm", *chain_of)
    said = run("pin", *chain_of, ok=False)
    assert "0 of 20 blocks are pinned, block 0 is the first that is not" in said
    assert "kvferry prefix build" in said


def test_pins_stay_when_others_are_evicted(lab: Lab, start_node: Callable[..., NodeProcess]) -> None:
    node = start_node("--memory", "4MiB").address
    one = Lab(lab.chain, lab.bundle, [node])
    one.fill(num_bytes=60_000)
    run("pin", "--chain-of", lab.bundle, "--store", node)

    async def flood() -> int:
        others = small_chain(60, first_token=5000)
        async with Nodes([node]).open() as store:
            for index, key in enumerate(others.keys):
                await store.of_chain(others.keys).put(key, record_of(others, index, 100_000))
            return (await store.stats()).evictions

    assert asyncio.run(flood()) > 0
    assert one.held([node]) == 20
    run("unpin", "--chain-of", lab.bundle, "--store", node)
    asyncio.run(flood())
    assert "pinned" not in run("list", "--store", node)


def test_copies_between_one_node_and_several(lab: Lab, start_node: Callable[..., NodeProcess]) -> None:
    lab.fill()
    chain_of = ["--chain-of", lab.bundle]
    single = start_node().address
    assert "20 blocks stored" in run("push", single, *chain_of, *lab.stores)
    assert lab.held([single]) == 20
    targets = [start_node().address for _ in range(2)]
    assert "20 blocks stored" in run("push", *targets, *chain_of, "--store", single)
    assert lab.held(targets) == 20
    assert [run("list", "--store", target).count("32 tokens") for target in targets] == [
        sum(ranked(first, targets)[0] == target for first in run_keys(lab.chain.keys)) for target in targets
    ]
    assert "0 blocks stored" in run("push", *targets, *chain_of, *lab.stores)
    again = lab.bundle.with_name("again")
    run("export", *chain_of, "-o", again, *(word for target in targets for word in ("--store", target)))
    run("verify", again)
    said = run("rm", *chain_of, *lab.stores)
    assert "20 records of 20 blocks, copies counted, were on 3 nodes" in said
    assert lab.held(lab.addresses) == 0


def test_what_is_no_list_of_nodes(lab: Lab) -> None:
    node = lab.addresses[0]
    assert "given twice" in run("rm", "--chain-of", lab.bundle, "--store", node, "--store", node, ok=False)
    assert "host:port" in run("pin", "--chain-of", lab.bundle, "--store", node, "--store", "nowhere", ok=False)
    said = run("rm", "--chain-of", lab.bundle, "--store", node, "--store", "127.0.0.1:1", ok=False)
    assert "did not answer, the others did: 127.0.0.1:1" in said
