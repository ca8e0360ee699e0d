"""Where blocks live: balance, distinct copies, and how little moves when a node joins or leaves."""

from __future__ import annotations

import hashlib
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.kvstore import Namespace, block_keys
from kvferry.kvstore.placement import MAX_RUN_BLOCKS, ranked, run_keys, run_start

hosts = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
nodes = st.sets(st.builds("{}:{}".format, hosts, st.integers(1, 65535)), min_size=1, max_size=12)
run_ids = st.binary(min_size=32, max_size=32)


def some_runs(count: int) -> list[bytes]:
    return [hashlib.sha256(b"run %d" % number).digest() for number in range(count)]


@given(st.integers(0, 100_000))
def test_runs_partition_a_chain(index: int) -> None:
    start = run_start(index)
    assert start <= index < start + MAX_RUN_BLOCKS
    assert run_start(start) == start
    assert run_start(start - 1) < start or start == 0
    assert all(run_start(between) == start for between in range(start, index))


def test_runs_grow_with_the_chain() -> None:
    starts = sorted({run_start(index) for index in range(130)})
    assert starts == [0, 1, 2, 4, 8, 16, 32, 64, 96, 128]


@given(run_ids, nodes)
def test_copies_are_on_distinct_nodes_and_the_order_of_the_list_is_nothing(run: bytes, names: set[str]) -> None:
    order = ranked(run, names)
    assert sorted(order) == sorted(names)
    assert ranked(run, sorted(names, reverse=True)) == order


@given(run_ids, nodes, st.data())
def test_who_joins_or_leaves_changes_nobody_elses_order(run: bytes, names: set[str], data: st.DataObject) -> None:
    order = ranked(run, names)
    gone = data.draw(st.sampled_from(sorted(names)))
    assert ranked(run, names - {gone}) == [name for name in order if name != gone]
    # So of `copies` nodes at most one is another after a change.
    copies = data.draw(st.integers(1, 3))
    before, after = set(order[:copies]), set(ranked(run, names - {gone})[:copies])
    assert len(before - after) == (gone in before)


@settings(deadline=None, max_examples=25)  # thousands of hashes each
@given(st.integers(2, 10), st.integers(1, 3), st.integers(0, 2**32))
def test_runs_are_spread_evenly(count: int, copies: int, seed: int) -> None:
    names = [f"10.{seed % 251}.0.{number}:7700" for number in range(count)]
    loads = Counter(name for run in some_runs(4000) for name in ranked(run, names)[:copies])
    fair = 4000 * min(copies, count) / count
    # Five standard deviations of a binomial around the fair share.
    assert all(abs(loads[name] - fair) < 5 * fair**0.5 for name in names)


@settings(deadline=None, max_examples=25)  # thousands of hashes each
@given(st.integers(2, 10))
def test_one_nth_of_the_runs_moves(count: int) -> None:
    names = [f"node-{number}:7700" for number in range(count)]
    runs = some_runs(4000)
    moved = sum(ranked(run, names)[0] != ranked(run, [*names, "new:7700"])[0] for run in runs)
    fair = len(runs) / (count + 1)
    assert abs(moved - fair) < 5 * fair**0.5
    assert all(
        ranked(run, [*names, "new:7700"])[0] in (ranked(run, names)[0], "new:7700") for run in runs
    )  # nothing moves between those that stay


def test_prompts_that_share_only_their_first_block_do_not_meet_on_one_node(namespace: Namespace) -> None:
    """What runs of 32 from the start would do, and what growing ones do, with 4 nodes."""
    names = [f"node-{number}:7700" for number in range(4)]
    growing: Counter[str] = Counter()
    fixed: Counter[str] = Counter()
    for prompt in range(300):
        chain = block_keys(namespace, [*range(32), *([prompt] * 32 * 31)])
        growing.update(ranked(run, names)[0] for run in run_keys(chain))
        fixed.update(ranked(chain[index - index % 32], names)[0] for index in range(len(chain)))
    assert max(fixed.values()) == 300 * 32  # the control: everything on one node
    assert max(growing.values()) < 300 * 32 * 0.4
