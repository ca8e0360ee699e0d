"""From the identity that workers exchange to the namespace of their block keys."""

from __future__ import annotations

from kvferry.kvstore.key import Namespace
from kvferry.proto import worker_pb2


def namespace_of(identity: worker_pb2.ModelIdentity, *, tenant: str, block_size: int) -> Namespace:
    """Of the blocks that a worker of this identity makes. Raises ValueError for malformed digests."""
    return Namespace(
        tenant=tenant,
        weights_digest=identity.weights_digest,
        tokenizer_digest=identity.tokenizer_digest,
        spec_digest=identity.spec_digest,
        layout_version=identity.layout_version,
        numerics_class=identity.numerics_class,
        block_size=block_size,
    )


def unreadable_because(reader: worker_pb2.ModelIdentity, maker: worker_pb2.ModelIdentity) -> list[str]:
    """Why a worker cannot use blocks that another one makes: names of fields in which they differ; empty: it can.

    Blocks of another numerics class say the same in other last bits. They are read under their maker's keys.
    """
    fields = [field.name for field in worker_pb2.ModelIdentity.DESCRIPTOR.fields if field.name != "numerics_class"]
    return [name for name in fields if getattr(reader, name) != getattr(maker, name)]
