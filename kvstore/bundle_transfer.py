"""Moves a chain between store nodes and bundles, a record at a time; each way goes on where it was interrupted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass

from kvferry.kvstore.bundle_chain import Chain
from kvferry.kvstore.bundle_reader import BundleReader
from kvferry.kvstore.bundle_writer import BundleWriter
from kvferry.kvstore.codec import Record, encode_record
from kvferry.kvstore.errors import BlockCorrupt, BlockNotFound, KVStoreError, StoreFull
from kvferry.kvstore.store import ChainStore, Store

# Records that one Get asks for: its timeout is for this many, and as many are leased at a time.
WINDOW = 32
LEASE_S = 30.0
_POLL_S = 0.2

Progress = Callable[[int], None]
"""Called with the number of blocks that are done, those found done included."""


@dataclass
class Transferred:
    """What a transfer did. Bytes count whole records."""

    num_sent: int = 0
    num_present: int = 0  # already at the destination
    bytes_sent: int = 0


async def num_stored(store: Store, chain: Chain) -> int:
    """How many of the chain's first blocks the node holds."""
    return (await store.of_chain(chain.keys).lookup(chain.keys)).num_contiguous


async def wait_until_stored(store: Store, chain: Chain, *, timeout_s: float) -> int:
    """`num_stored`, asked again until it is all of the chain or `timeout_s` are over: publishing goes on behind an
    answer."""
    end = time.monotonic() + timeout_s
    while (found := await num_stored(store, chain)) < len(chain.keys) and time.monotonic() < end:
        await asyncio.sleep(_POLL_S)
    return found


async def export_chain(store: Store, writer: BundleWriter, chain: Chain, progress: Progress) -> None:
    """Appends what `writer` lacks. Raises BlockNotFound, before anything is read, when the node lacks some of it; what
    came before is kept."""
    progress(writer.num_done)
    await _require_stored(store, chain, writer.num_done)
    async with aclosing(_records(store, chain, writer.num_done)) as records:
        async for record in records:
            writer.append(_encoded(record, chain))
            progress(writer.num_done)


async def import_bundle(
    reader: BundleReader, store: Store, progress: Progress, *, target: Chain | None = None
) -> Transferred:
    """Puts the records that the node lacks, in order, so that what has come is usable at once.

    `target` is the bundle's chain under another tenant: the same payloads in records of that chain. Whether the
    bundle's signer is trusted and its deployment the right one is for the caller to check before.
    """
    chain = target or reader.header.chain
    done = Transferred(num_present=await num_stored(store, chain))
    progress(done.num_present)
    own = reader.header.chain.namespace == chain.namespace
    placed = store.of_chain(chain.keys)
    for index in range(done.num_present, len(chain.keys)):
        # A thread reads and hashes, so that the connection's pings are answered meanwhile.
        if own:
            record = await asyncio.to_thread(reader.raw_record, index)
        else:
            record = _encoded(await asyncio.to_thread(reader.record, index), chain)
        await _put(placed, chain.keys[index], record, done)
        progress(index + 1)
    await _require_kept(store, chain)
    return done


async def copy_chain(source: Store, target: Store, chain: Chain, progress: Progress) -> Transferred:
    """From store to store; memory holds one record, besides what gRPC buffers. Raises like `export_chain`."""
    done = Transferred(num_present=await num_stored(target, chain))
    progress(done.num_present)
    await _require_stored(source, chain, done.num_present)
    placed = target.of_chain(chain.keys)
    async with aclosing(_records(source, chain, done.num_present)) as records:
        async for record in records:
            await _put(placed, chain.keys[record.header.block_index], _encoded(record, chain), done)
            progress(record.header.block_index + 1)
    await _require_kept(target, chain)
    return done


async def _records(store: Store, chain: Chain, start: int) -> AsyncGenerator[Record]:
    """The verified records from block `start` on, leased while they are read. Raises BlockNotFound."""
    namespace = chain.namespace.digest()
    placed = store.of_chain(chain.keys)
    for first in range(start, len(chain.keys), WINDOW):
        keys = chain.keys[first : first + WINDOW]
        found = await placed.lookup(keys, lease_s=LEASE_S)
        try:
            if found.num_contiguous < len(keys):
                raise _not_stored(chain, first + found.num_contiguous)
            async with aclosing(placed.get(keys, namespace=namespace, lease_id=found.lease_id)) as records:
                index = first
                async for record in records:
                    header = record.header
                    if header.block_index != index or header.num_tokens != chain.namespace.block_size:
                        raise BlockCorrupt(f"the record of block {index} says that it is block {header.block_index}")
                    yield record
                    index += 1
        finally:
            if found.lease_id:
                with suppress(KVStoreError):  # then the lease ends by itself
                    await placed.release(found.lease_id)


async def _require_stored(store: Store, chain: Chain, start: int) -> None:
    missing = chain.keys[start:]
    if missing and (found := (await store.of_chain(chain.keys).lookup(missing)).num_contiguous) < len(missing):
        raise _not_stored(chain, start + found)


def _not_stored(chain: Chain, index: int) -> BlockNotFound:
    return BlockNotFound(
        f"the store lacks block {index} of the prefix's {len(chain.keys)}: compute it with kvferry prefix build, then "
        "repeat this command",
        index=index,
    )


async def _put(store: ChainStore, key: bytes, record: bytes, done: Transferred) -> None:
    if await store.put(key, record):
        done.num_sent += 1
        done.bytes_sent += len(record)
    else:
        done.num_present += 1


async def _require_kept(store: Store, chain: Chain) -> None:
    """A node that is too small takes every record and evicts the first ones for the last."""
    kept = await num_stored(store, chain)
    if kept < len(chain.keys):
        raise StoreFull(
            f"the node kept only the first {kept} of {len(chain.keys)} blocks: give it more memory, then repeat this"
        )


def _encoded(record: Record, chain: Chain) -> bytes:
    """The record's one encoding, under the chain's key for its block."""
    index = record.header.block_index
    return encode_record(
        key=chain.keys[index],
        namespace=chain.namespace.digest(),
        block_index=index,
        num_tokens=record.header.num_tokens,
        payload=[record.payload],
    )
