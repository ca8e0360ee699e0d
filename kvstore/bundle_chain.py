"""A prefix as the store knows it: the blocks from its first token on, and everything that decides their bytes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvferry.kvstore.bundle_errors import BundleRefused
from kvferry.kvstore.config import DEFAULT_MAX_KEYS
from kvferry.kvstore.errors import InvalidRequest
from kvferry.kvstore.key import KEY_BYTES, Namespace, block_keys

MAX_BLOCKS = DEFAULT_MAX_KEYS
"""One look-up must be able to name the whole chain."""
MAX_TOKENS = 1 << 21
MAX_MODEL_NAME_BYTES = 1024
MAX_BF16_BYTES_PER_TOKEN = 1 << 32

_DIGEST_WORDS = {
    "weights_digest": "the model's weights",
    "tokenizer_digest": "the tokenizer",
    "spec_digest": "the quantization spec",
    "numerics_class": "the numerics class",
}
_NUMBER_WORDS = {"layout_version": "the layout version", "block_size": "the block size"}


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Complete blocks of one prompt. Immutable; `keys` of a chain with token ids are those of its token ids."""

    model_name: str
    """For people; the namespace's digests decide."""
    namespace: Namespace
    bf16_bytes_per_token: int
    """What a token's K and V would take in 16 bits."""
    keys: tuple[bytes, ...]
    token_ids: array[int] | None
    """`num_tokens` ids, or None where they are kept back."""

    @property
    def num_tokens(self) -> int:
        return len(self.keys) * self.namespace.block_size

    def until(self, key: bytes) -> Chain:
        """The chain up to the block with this key. Raises InvalidRequest when it has none."""
        if key not in self.keys:
            raise InvalidRequest(f"none of the chain's {len(self.keys)} blocks has this key")
        return self._first(self.keys.index(key) + 1)

    def without_tokens(self) -> Chain:
        return replace(self, token_ids=None)

    def under_tenant(self, tenant: str) -> Chain:
        """The same tokens in another tenant's namespace: other keys. Raises BundleRefused without token
        ids, InvalidRequest for an impossible tenant."""
        if tenant == self.namespace.tenant:
            return self
        if self.token_ids is None:
            raise BundleRefused(
                "the bundle was exported with --no-tokens: keys of another tenant cannot be computed without token "
                "ids; import it under its own tenant"
            )
        try:
            namespace = replace(self.namespace, tenant=tenant)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        return replace(self, namespace=namespace, keys=tuple(block_keys(namespace, self.token_ids)))

    def _first(self, num_blocks: int) -> Chain:
        token_ids = None if self.token_ids is None else self.token_ids[: num_blocks * self.namespace.block_size]
        return replace(self, keys=self.keys[:num_blocks], token_ids=token_ids)


def chain_of(*, model_name: str, namespace: Namespace, bf16_bytes_per_token: int, token_ids: Sequence[int]) -> Chain:
    """The complete blocks of these token ids. Raises InvalidRequest where there is none, or too many."""
    try:
        keys = block_keys(namespace, token_ids)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    if not keys:
        raise InvalidRequest(
            f"the prompt has {len(token_ids)} tokens, less than a block of {namespace.block_size}: "
            "nothing of it is stored"
        )
    complete = array("I", token_ids[: len(keys) * namespace.block_size])
    chain = Chain(
        model_name=model_name,
        namespace=namespace,
        bf16_bytes_per_token=bf16_bytes_per_token,
        keys=tuple(keys),
        token_ids=complete,
    )
    problem = chain_problem(chain)
    if problem is not None:
        raise InvalidRequest(problem)
    return chain


def chain_problem(chain: Chain) -> str | None:
    """Why this cannot be a chain, or None. Recomputes the keys where there are token ids."""
    if not 1 <= len(chain.keys) <= MAX_BLOCKS:
        return f"a chain must have 1 to {MAX_BLOCKS} blocks, not {len(chain.keys)}"
    if chain.num_tokens > MAX_TOKENS:
        return f"a chain must have at most {MAX_TOKENS} tokens, not {chain.num_tokens}"
    if len(chain.model_name.encode()) > MAX_MODEL_NAME_BYTES:
        return f"the model's name is longer than {MAX_MODEL_NAME_BYTES} bytes"
    if not 0 <= chain.bf16_bytes_per_token <= MAX_BF16_BYTES_PER_TOKEN:
        return "the size of a token in 16 bits is impossible"
    if any(len(key) != KEY_BYTES for key in chain.keys) or len(set(chain.keys)) != len(chain.keys):
        return f"the keys are not distinct keys of {KEY_BYTES} bytes"
    if chain.token_ids is not None and tuple(block_keys(chain.namespace, chain.token_ids)) != chain.keys:
        return "its block keys are not those of its token ids in its namespace"
    return None


def differences(ours: Namespace, theirs: Namespace) -> list[str]:
    """In words, what differs between two namespaces besides the tenant; digests by their first 8 digits."""
    found = [
        f"{words} ({getattr(ours, name).hex()[:8]}, not {getattr(theirs, name).hex()[:8]})"
        for name, words in _DIGEST_WORDS.items()
        if getattr(ours, name) != getattr(theirs, name)
    ]
    return found + [
        f"{words} ({getattr(ours, name)}, not {getattr(theirs, name)})"
        for name, words in _NUMBER_WORDS.items()
        if getattr(ours, name) != getattr(theirs, name)
    ]


def require_same_deployment(chain: Chain, *, model_name: str, namespace: Namespace) -> None:
    """Raises BundleRefused, naming what differs, unless blocks of `chain` are usable in `namespace`'s deployment."""
    found = differences(chain.namespace, namespace)
    if found:
        raise BundleRefused(
            f"the prefix of model {chain.model_name!r} does not fit the deployment of {model_name!r}; "
            f"these differ: {'; '.join(found)}. Its blocks would be wrong there or never found"
        )
