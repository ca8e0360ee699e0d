"""What can be wrong with a bundle, under the store's two leaves for it.

BlockCorrupt
└── BundleDamaged      the bytes are no valid bundle: get the file again
InvalidRequest
└── BundleRefused      the bundle is intact, but not for here, or nobody vouches for it: the message says what to do

As everywhere in the store, no message holds a block key, a token id or a tenant. Signers' public keys may be shown.
"""

from __future__ import annotations

from kvferry.kvstore.errors import BlockCorrupt, InvalidRequest


class BundleDamaged(BlockCorrupt):
    """Not a bundle, a cut one, or one with a changed bit. No byte of the damaged part was used."""


class BundleRefused(InvalidRequest):
    """An intact bundle that must not be used as asked: unsigned, of an unknown signer, or of another deployment."""
