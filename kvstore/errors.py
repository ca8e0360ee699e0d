"""The store's exceptions, split by who can act.

KVStoreError
├── BlockNotFound      a record is not in the store: recompute the block
├── BlockCorrupt       bytes failed their checks and must not be used: recompute the block
├── StoreUnavailable   the node or its backend does not answer: go on without the store
├── StoreFull          no room for this put: go on without storing
└── InvalidRequest     the caller broke a limit or a format: fix the caller (also a ValueError)

None of the messages holds a block key, a token id or a tenant: they may be logged.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Base of everything the store raises on purpose."""


class BlockNotFound(KVStoreError):
    """A record is not in the store.

    `index` is the position of the missing key in the request, or None where there was no list.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class BlockCorrupt(KVStoreError):
    """Bytes are damaged, belong to another block, or cannot be checked. They were not returned."""


class StoreUnavailable(KVStoreError):
    """The node (or the Redis behind it) did not answer in time, or the breaker is open."""


class StoreFull(KVStoreError):
    """There is no room for the record now. Nothing was changed."""


class InvalidRequest(KVStoreError, ValueError):
    """The request breaks the contract: a malformed key, too many keys, a record over the limit."""
