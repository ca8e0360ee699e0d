"""`kvferry prefix pin`, `unpin` and the listing of store nodes."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

from kvferry.deploy.cli_failure import fail
from kvferry.deploy.prefix import options as opt
from kvferry.deploy.prefix.access import access
from kvferry.deploy.prefix.failing import failing
from kvferry.deploy.prefix.naming import named_chain
from kvferry.deploy.prefix.report import size_words
from kvferry.deploy.prefix.stores import Nodes, patient_client
from kvferry.kvstore.bundle_chain import Chain
from kvferry.kvstore.errors import StoreUnavailable
from kvferry.kvstore.node_answers import ListedRecord, NodeStats
from kvferry.proto.peer_security import PeerSecurity


def pin(
    prompt_file: opt.PromptFile = None,
    question: opt.Question = None,
    raw: opt.Raw = False,
    chain_of: opt.ChainOf = None,
    until: opt.Until = None,
    worker: opt.Worker = opt.WORKER,
    store: opt.Store = opt.STORE,
    tenant: opt.Tenant = opt.TENANT,
    model: opt.Model = None,
) -> None:
    """Keep a prefix's blocks in the store until they are unpinned or removed. Pins may hold half of a node."""
    with failing():
        chain = _chain(prompt_file, question, raw, chain_of, until, worker, tenant, model)
        changed = asyncio.run(_set_pins(Nodes(store, security=access().peers), chain, unpin=False))
    if not all(changed):
        fail(
            f"{sum(changed)} of {len(changed)} blocks are pinned, block {changed.index(False)} is the first that is "
            "not: the store lacks it (kvferry prefix build), has it in Redis alone, or its pins hold half of it already"
        )
    print(f"all {len(changed)} blocks are pinned")


def unpin(
    prompt_file: opt.PromptFile = None,
    question: opt.Question = None,
    raw: opt.Raw = False,
    chain_of: opt.ChainOf = None,
    until: opt.Until = None,
    worker: opt.Worker = opt.WORKER,
    store: opt.Store = opt.STORE,
    tenant: opt.Tenant = opt.TENANT,
    model: opt.Model = None,
) -> None:
    """End the pins of a prefix's blocks, also those of other prefixes that share them."""
    with failing():
        chain = _chain(prompt_file, question, raw, chain_of, until, worker, tenant, model)
        changed = asyncio.run(_set_pins(Nodes(store, security=access().peers), chain, unpin=True))
    print(f"{sum(changed)} of {len(changed)} blocks were pinned and no longer are")


def list_nodes(addresses: list[str], limit: int, security: PeerSecurity) -> None:
    """Prints what each node holds: a line for at most `limit` of its records, and its sizes."""
    with failing():
        missing = 0
        for address in addresses:
            listed = asyncio.run(_listing(address, limit, security))
            if isinstance(listed, Exception):
                missing += 1
                print(f"{address}: {listed}")
                continue
            records, stats = listed
            print(f"{address}: {stats.backend}, {stats.records:,} records, {size_words(stats.bytes)}{_tiers(stats)}")
            for record in records:
                print(_line(record))
            if limit and len(records) == limit:
                print(f"  ... (--limit {limit}; 0 lists all)")
        if missing:
            fail(f"{missing} of {len(addresses)} nodes did not answer")


def _chain(
    prompt_file: Path | None,
    question: str | None,
    raw: bool,
    chain_of: Path | None,
    until: str | None,
    worker: str,
    tenant: str,
    model: str | None,
) -> Chain:
    return named_chain(
        prompt_file=prompt_file,
        question=question,
        raw=raw,
        chain_of_bundle=chain_of,
        until=until,
        worker=worker,
        tenant=tenant,
        model=model,
        security=access().peers,
    )


async def _set_pins(nodes: Nodes, chain: Chain, *, unpin: bool) -> list[bool]:
    async with nodes.open() as store:
        return await (store.unpin(chain.keys) if unpin else store.pin(chain.keys))


async def _listing(
    address: str, limit: int, security: PeerSecurity
) -> tuple[list[ListedRecord], NodeStats] | StoreUnavailable:
    async with patient_client(address, security) as client:
        try:
            stats = await client.stats()
            records: list[ListedRecord] = []
            async with aclosing(client.list_records()) as listed:
                async for record in listed:
                    records.append(record)
                    if limit and len(records) == limit:
                        break
        except StoreUnavailable as error:
            return error
    return records, stats


def _tiers(stats: NodeStats) -> str:
    words = [
        f"{tier.name} {size_words(tier.bytes)}"
        + (f" of {size_words(tier.capacity_bytes)}" if tier.capacity_bytes else "")
        + (f", {size_words(tier.pinned_bytes)} pinned" if tier.pinned_bytes else "")
        + ("" if tier.available else ", does not answer")
        for tier in stats.tiers
    ]
    return f" ({'; '.join(words)})" if words else ""


def _line(record: ListedRecord) -> str:
    block = f"block {record.block_index}, {record.num_tokens} tokens" if record.num_tokens else "unreadable header"
    age = "" if record.age_s is None else f", {record.age_s:,.0f} s old"
    pinned = ", pinned" if record.pinned else ""
    return f"  {record.key.hex()} {block}, {size_words(record.record_bytes)}, {record.tier}{age}{pinned}"
