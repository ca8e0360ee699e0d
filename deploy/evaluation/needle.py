"""Passkey retrieval: is one number, somewhere in a long text, still found?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kvferry.deploy.evaluation.packed import PackedRun

FILLER = (
    "The grass is green and the sky is blue. The sun rises in the east and sets in the west. "
    "Rivers run down to the sea, and the wind carries the clouds over the hills. "
)
NEEDLE = "The secret pass key is {key}. Remember it: {key} is the secret pass key. "
QUESTION = "\n\nWhat is the secret pass key in the text above? The secret pass key is"
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class NeedleResult:
    """`found` of a preset by length and depth."""

    preset: str
    length: int
    """Tokens of the prompt, about."""
    depth: float
    """0: the beginning, 1: the end."""
    found: bool
    answer: str


def needle_prompt(tokenizer: PreTrainedTokenizerBase, *, length: int, depth: float, key: str) -> list[int]:
    """A prompt of at most `length` tokens with the pass key at a depth of the filler."""
    question = tokenizer.encode(QUESTION, add_special_tokens=False)
    needle = tokenizer.encode(" " + NEEDLE.format(key=key), add_special_tokens=False)
    filler = tokenizer.encode(FILLER, add_special_tokens=False)
    room = length - len(question) - len(needle)
    if room < len(filler):
        raise ValueError(f"a needle prompt needs at least {length - room + len(filler)} tokens, not {length}")
    repeats = room // len(filler)
    before = round(repeats * depth)
    ids = filler * before + needle + filler * (repeats - before) + question
    return [int(i) for i in ids]


def needle_key(length: int, depth: float) -> str:
    """Five digits, the same in every run and for every preset."""
    return str(10007 + (length * 7919 + round(depth * 100) * 104729) % 89989)


def find_needles(
    name: str,
    run: PackedRun,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    on_step: Callable[[], None],
) -> list[NeedleResult]:
    """One prompt for each length and depth, greedy."""
    results = []
    for length in lengths:
        for depth in depths:
            key = needle_key(length, depth)
            prompt = needle_prompt(tokenizer, length=length, depth=depth, key=key)
            (answer,) = run.generate([prompt], max_tokens=ANSWER_TOKENS)
            text = str(tokenizer.decode(answer))
            results.append(NeedleResult(name, length, depth, key in text, text))
            on_step()
    return results
