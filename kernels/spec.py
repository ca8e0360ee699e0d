"""The quantization spec: what a packed value means. Its digest is part of every block key."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class KVQuantSpec:
    """How K and V are quantized. Every field changes stored bits, so every field is in the digest.

    Keys are grouped per channel along tokens, values per token along channels (KIVI,
    arXiv 2402.02750, section 3). Only what the kernels of this release implement is accepted.
    """

    bits: int = 2
    """Width of a code."""
    group_size: int = 32
    """Values that share a scale and a zero point: tokens for K, channels for V."""
    fit: str = "least-squares"
    """How scale and zero point are found; see `reference.fit_groups`."""
    sink_tokens: int = 4
    """The first tokens of a sequence, kept in fp16."""
    block_size: int = 128
    """Tokens a block; also the prefill chunk grid (the canonical-block rule)."""

    def __post_init__(self) -> None:
        if self.bits != 2 or self.group_size != 32 or self.fit != "least-squares":
            raise ValueError(
                f"unsupported quantization spec {self}: this release packs 2-bit codes in groups "
                "of 32 with the least-squares fit"
            )
        if self.block_size % self.group_size or not 32 <= self.block_size <= 1024:
            raise ValueError(
                f"block_size {self.block_size} must be a multiple of {self.group_size} between 32 and 1024"
            )
        if not 0 <= self.sink_tokens <= 16:
            raise ValueError(f"sink_tokens {self.sink_tokens} must be between 0 and 16")

    def digest(self) -> bytes:
        """SHA-256 over the length-prefixed fields, in their order of declaration. 32 bytes."""
        h = hashlib.sha256()
        for part in (
            "kvferry-spec",
            *(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)),
        ):
            raw = part.encode()
            h.update(len(raw).to_bytes(4, "little") + raw)
        return h.digest()
