"""The KV store: block keys, records, the node that keeps them and the client that moves them.

The Redis backend is not imported here (it needs redis): see `kvferry.kvstore.redis_backend`.
"""

from kvferry.kvstore.backend import Backend, BackendStats
from kvferry.kvstore.client import LookupResult, StoreClient
from kvferry.kvstore.client_counters import ClientCounters
from kvferry.kvstore.codec import BlockHeader, Record, decode_record, encode_record
from kvferry.kvstore.config import ClientConfig, NodeConfig
from kvferry.kvstore.errors import (
    BlockCorrupt,
    BlockNotFound,
    InvalidRequest,
    KVStoreError,
    StoreFull,
    StoreUnavailable,
)
from kvferry.kvstore.key import Namespace, block_keys
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.node_answers import ListedRecord, NodeStats, PutManyOutcome
from kvferry.kvstore.ring import StoreRing
from kvferry.kvstore.ring_config import RingConfig
from kvferry.kvstore.server import KVStoreServer
from kvferry.kvstore.store import ChainStore, Store

__all__ = [
    "Backend",
    "BackendStats",
    "BlockCorrupt",
    "BlockHeader",
    "BlockNotFound",
    "ChainStore",
    "ClientConfig",
    "ClientCounters",
    "InvalidRequest",
    "KVStoreError",
    "KVStoreServer",
    "ListedRecord",
    "LookupResult",
    "MemoryBackend",
    "Namespace",
    "NodeConfig",
    "NodeStats",
    "PutManyOutcome",
    "Record",
    "RingConfig",
    "Store",
    "StoreClient",
    "StoreFull",
    "StoreRing",
    "StoreUnavailable",
    "block_keys",
    "decode_record",
    "encode_record",
]
