"""Token ids to text, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

REPLACEMENT = "\ufffd"  # what a tokenizer makes of an incomplete or invalid character

_SLICE = 8  # tokens added at a time; also bounds how much an emission decodes again
_MAX_PENDING = 16  # an honest character is complete after 4 tokens; more means invalid bytes
_HARD_MAX_PENDING = 64
_CONTEXT_TOKENS = 6


class Decoder(Protocol):
    """The part of a transformers tokenizer that detokenization needs."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    def decode(
        self,
        token_ids: list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str: ...


class Detokenizer:
    """Incremental detokenization of one answer.

    The pieces that `push` and `finish` return, joined, are what decoding all tokens at once gives; no piece ends inside
    a character. Only the tokens since the last two emissions are decoded again, never the whole answer.

    Invariant: `_window[:_num_read]` is emitted and gives the decoder its context (sentencepiece drops the leading space
    of the first token it sees); `_window[_num_read:]` is pending.

    Tokenizers with byte fallback turn a run of byte tokens that is not valid UTF-8 into replacement characters as a
    whole. A character that was emitted before its run turned invalid stays emitted.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        context_token_ids: Sequence[int] = (),
        *,
        special_ids: frozenset[int] | None = None,
    ) -> None:
        """`context_token_ids` precede the answer: with them, what follows "Hello" may start with a space.

        `special_ids` saves asking the tokenizer for every answer.
        """
        self._tokenizer = tokenizer
        self._special_ids = special_token_ids(tokenizer) if special_ids is None else special_ids
        self._window = [t for t in context_token_ids[-_CONTEXT_TOKENS:] if t not in self._special_ids]
        self._prefix_text = self._decode(self._window)
        if self._prefix_text.endswith(REPLACEMENT):  # the prompt ends inside a character
            self._window, self._prefix_text = [], ""
        self._num_read = len(self._window)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` complete; empty while a character is incomplete."""
        pieces = []
        for start in range(0, len(token_ids), _SLICE):
            new = [t for t in token_ids[start : start + _SLICE] if t not in self._special_ids]
            if new:
                pieces.append(self._push(new))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest; an incomplete last character comes out as replacement characters."""
        text = self._decode(self._window)
        piece = text[len(self._prefix_text) :]
        self._window, self._num_read, self._prefix_text = [], 0, ""
        return piece

    def _push(self, new: list[int]) -> str:
        num_before = len(self._window)
        self._window += new
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT):
            if len(text) > len(self._prefix_text):
                return self._emit(text)
            if self._num_read == num_before:  # tokens without text: nothing to keep as context
                del self._window[num_before:]
            return ""
        if len(self._window) - self._num_read <= _MAX_PENDING:
            return ""
        return self._emit_up_to_clean_border(text)

    def _emit(self, text: str) -> str:
        piece = text[len(self._prefix_text) :]
        del self._window[: self._num_read]
        self._num_read = len(self._window)
        self._prefix_text = self._decode(self._window)
        return piece

    def _emit_up_to_clean_border(self, text: str) -> str:
        """Bounds the window under invalid bytes.

        A border is clean if both sides decode alone to what they decode to together. Then no character spans it, and
        as the right side is not empty, none will.
        """
        window = self._window
        for border in range(len(window) - 1, self._num_read, -1):
            left, right = self._decode(window[:border]), self._decode(window[border:])
            if right and left + right == text:
                self._window, self._num_read = window[border:], 0
                piece, self._prefix_text = left[len(self._prefix_text) :], ""
                return piece
        if len(window) - self._num_read <= _HARD_MAX_PENDING:
            return ""
        return self.finish()

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TokenTexts:
    """The text of single tokens, with their leading space, for log-probabilities. Special tokens show as written."""

    def __init__(self, tokenizer: Decoder, *, cache_size: int = 65_536) -> None:
        self._tokenizer = tokenizer
        self.text = lru_cache(maxsize=cache_size)(self._text)

    def _text(self, token_id: int) -> str:
        # Decoded after itself, because sentencepiece drops the leading space of a first token.
        once, twice = self._decode([token_id]), self._decode([token_id, token_id])
        return twice[len(once) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def special_token_ids(tokenizer: Decoder) -> frozenset[int]:
    """Ids of tokens that mark structure and are no text, such as the end token."""
    return frozenset(token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
