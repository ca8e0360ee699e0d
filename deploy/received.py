"""What a client already has of an answer: told as a count and a digest, checked while the answer is made again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple


class Received(NamedTuple):
    num_tokens: int
    digest: bytes


class TokenDigest:
    """SHA-256 of token ids, each as 4 bytes, the lowest first."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self.num_tokens = 0

    def update(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            self._sha.update(token_id.to_bytes(4, "little"))
            self.num_tokens += 1

    @property
    def received(self) -> Received:
        """So far. The digest of nothing is empty."""
        return Received(self.num_tokens, self._sha.digest() if self.num_tokens else b"")


class ReceivedCheck:
    """Compares an answer's first tokens with what the client has; see `Received`."""

    def __init__(self, received: Received) -> None:
        self._received = received
        self._digest = TokenDigest()

    @property
    def is_over(self) -> bool:
        """What comes now is new to the client."""
        return self._digest.num_tokens >= self._received.num_tokens

    def add(self, token_id: int) -> bool:
        """Takes the next token that the client has. False when they turn out to differ."""
        self._digest.update([token_id])
        return not self.is_over or self._digest.received == self._received
