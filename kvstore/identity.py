"""From the identity that workers exchange to the namespace of their block keys."""

from __future__ import annotations

from kvferry.kvstore.key import Namespace
from kvferry.proto import worker_pb2


def namespace_of(identity: worker_pb2.ModelIdentity, *, tenant: str, block_size: int) -> Namespace:
    """Two workers share blocks exactly when this is equal for both. Raises ValueError for malformed digests."""
    return Namespace(
        tenant=tenant,
        weights_digest=identity.weights_digest,
        tokenizer_digest=identity.tokenizer_digest,
        spec_digest=identity.spec_digest,
        layout_version=identity.layout_version,
        numerics_class=identity.numerics_class,
        block_size=block_size,
    )
