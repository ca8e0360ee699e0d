"""Sampling against brute force: which tokens can come, how often, and what penalties make of a logit."""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter

import pytest
import torch

from kvferry.kernels.sampling import SamplingParams, TokenHistory, finish_reason, sample, uniform
from kvferry.proto import worker_pb2

# 8 tokens, none in order of probability; the least likely one has 2 %, so 1,000 draws show it.
PROBS = [0.05, 0.22, 0.02, 0.30, 0.08, 0.03, 0.18, 0.12]
LOGITS = torch.tensor(PROBS).log()
DRAWS = 1000


def history(*output: int, prompt: tuple[int, ...] = ()) -> TokenHistory:
    made = TokenHistory.of(prompt)
    for token_id in output:
        made.append(token_id)
    return made


def at(index: int) -> TokenHistory:
    """A history in which the next token has this index."""
    return TokenHistory(frozenset(), Counter(), index)


def draw(logits: torch.Tensor, draws: int = DRAWS, **params: object) -> Counter[int]:
    """Samples of many (seed, index) pairs."""
    return Counter(
        sample(logits, SamplingParams(seed=number // 10, **params), at(number % 10)).token_id  # type: ignore[arg-type]
        for number in range(draws)
    )


def brute_force(
    logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> dict[int, float]:
    """Token id -> probability: min_p against the likeliest, then the top_k, then the fewest that make top_p.

    A logit of -inf never comes.
    """
    largest = max(logits)
    weights = {i: math.exp((logit - largest) / temperature) for i, logit in enumerate(logits)}
    kept = sorted((i for i, w in weights.items() if w >= max(min_p, 1e-300)), key=lambda i: -weights[i])
    kept = kept[: top_k or len(kept)]
    total = sum(weights[i] for i in kept)
    nucleus: list[int] = []
    for token_id in kept:
        nucleus.append(token_id)
        if sum(weights[i] for i in nucleus) >= top_p * total:
            break
    total = sum(weights[i] for i in nucleus)
    return {i: weights[i] / total for i in nucleus}


def assert_drawn_from(expected: dict[int, float], drawn: Counter[int]) -> None:
    """Exactly these tokens, about this often."""
    assert set(drawn) == set(expected)
    draws = drawn.total()
    for token_id, probability in expected.items():
        spread = math.sqrt(draws * probability * (1 - probability))
        assert abs(drawn[token_id] - draws * probability) <= 5 * spread + 1e-9, token_id


def adjusted(logits: list[float], token_id: int, params: SamplingParams, past: TokenHistory) -> float:
    """The logit that a token competes with, found from the outside: the rival's logit at which greedy changes."""
    rival = len(logits)
    low, high = -100.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        others = [logit if i == token_id else -1000.0 for i, logit in enumerate(logits)]
        if sample(torch.tensor([*others, middle]), params, past).token_id == rival:
            high = middle
        else:
            low = middle
    return low


# --- the set and its probabilities ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_greedy_takes_the_likeliest(seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(1000)
    best = max(range(1000), key=logits.tolist().__getitem__)
    # The other filters change nothing: the likeliest token is always in the set.
    for params in (SamplingParams(seed=seed), SamplingParams(seed=seed, top_k=5, top_p=0.5, min_p=0.3)):
        assert {sample(logits, params, at(index)).token_id for index in range(20)} == {best}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_temperature(temperature: float) -> None:
    assert_drawn_from(
        brute_force(LOGITS.tolist(), temperature=temperature),
        draw(LOGITS, draws=3000, temperature=temperature),
    )


def test_a_tiny_temperature_is_greedy_and_a_large_one_is_uniform() -> None:
    assert set(draw(LOGITS, temperature=1e-3)) == {3}
    assert set(draw(LOGITS, temperature=1e-30)) == {3}
    assert_drawn_from(dict.fromkeys(range(8), 1 / 8), draw(LOGITS, draws=3000, temperature=1e6))


@pytest.mark.parametrize("top_k", [0, 1, 2, 3, 7, 8, 9, 1000])
def test_top_k(top_k: int) -> None:
    expected = brute_force(LOGITS.tolist(), top_k=top_k)
    assert len(expected) == min(top_k or 8, 8)
    assert_drawn_from(expected, draw(LOGITS, temperature=1.0, top_k=top_k))


@pytest.mark.parametrize(("top_p", "size"), [(1e-6, 1), (0.29, 1), (0.31, 2), (0.51, 2), (0.53, 3), (0.96, 7), (1, 8)])
def test_top_p(top_p: float, size: int) -> None:
    """The fewest tokens that together have top_p: the one that crosses it is in."""
    expected = brute_force(LOGITS.tolist(), top_p=top_p)
    assert len(expected) == size
    assert_drawn_from(expected, draw(LOGITS, temperature=1.0, top_p=top_p))


def test_top_p_exactly_on_the_edge() -> None:
    """Four tokens of 1/4: two of them are a half."""
    assert len(draw(torch.zeros(4), temperature=1.0, top_p=0.5)) == 2
    assert len(draw(torch.zeros(4), temperature=1.0, top_p=0.5 + 1e-6)) == 3


@pytest.mark.parametrize(("min_p", "size"), [(0.0, 8), (0.05, 8), (0.08, 7), (0.3, 4), (0.7, 2), (0.75, 1), (1.0, 1)])
def test_min_p(min_p: float, size: int) -> None:
    """Against the likeliest token, not against 1."""
    expected = brute_force(LOGITS.tolist(), min_p=min_p)
    assert len(expected) == size
    assert_drawn_from(expected, draw(LOGITS, temperature=1.0, min_p=min_p))


def test_min_p_keeps_tokens_on_the_edge() -> None:
    assert set(draw(torch.tensor([1.0, 1.0, 0.0]), temperature=1.0, min_p=1.0)) == {0, 1}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 4, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.75, "min_p": 0.3},
        {"temperature": 1.5, "top_p": 0.6},  # the set is of the probabilities after temperature
        {"temperature": 0.6, "min_p": 0.3},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.72},  # 0.72 of the three, not of the eight: 2 tokens, not 3
        {"temperature": 1.0, "top_p": 0.6, "min_p": 0.5},  # 0.6 of the three that min_p leaves: 2 tokens, not 3
    ],
)
def test_filters_together(options: dict[str, float]) -> None:
    expected = brute_force(LOGITS.tolist(), **options)  # type: ignore[arg-type]
    assert_drawn_from(expected, draw(LOGITS, draws=2000, **options))


@pytest.mark.parametrize("options", [{"min_p": 1.5}, {"top_p": -0.5}, {"top_p": 0.0}], ids=str)
def test_the_likeliest_token_is_always_in_the_set(options: dict[str, float]) -> None:
    """Even for a filter that would leave nothing; the gateway refuses such values."""
    assert set(draw(LOGITS, draws=50, temperature=1.0, **options)) == {3}


def test_a_large_vocabulary() -> None:
    torch.manual_seed(1)
    logits = torch.randn(50_000)
    allowed = set(brute_force(logits.tolist(), top_k=20, top_p=0.9))
    assert set(draw(logits, draws=300, temperature=1.0, top_k=20, top_p=0.9)) <= allowed


# --- randomness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 255, 2**32, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("index", [0, 1, 256, 100_000])
def test_uniform_equals_an_independent_expression(seed: int, index: int) -> None:
    digest = hashlib.new("sha256", b"kvferry-sample" + struct.pack("<QQ", seed, index)).digest()
    [integer] = struct.unpack("<Q", digest[:8])
    assert uniform(seed, index) == integer / 2**64


def test_uniform_golden_values() -> None:
    """Change these and every sampled answer of the past changes: a seed no longer reproduces it."""
    pairs = ((0, 0), (0, 1), (1, 0), (2**64 - 1, 12345))
    assert [uniform(seed, index) for seed, index in pairs] == [
        0.6820930863960888,
        0.3214825611587407,
        0.07371688900159126,
        0.7815751981166201,
    ]


def test_uniform_is_uniform() -> None:
    numbers = [uniform(seed, index) for seed in range(40) for index in range(50)]
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert len(set(numbers)) == len(numbers)
    tenths = Counter(int(number * 10) for number in numbers)
    assert all(abs(tenths[tenth] - 200) < 5 * math.sqrt(200) for tenth in range(10))


def test_seed_and_index_decide_and_nothing_else() -> None:
    params = SamplingParams(temperature=1.0, seed=5, top_p=0.9)
    pasts = [at(3), history(1, 1, 1), history(0, 4, 7, prompt=(1, 2, 3)), history(6, 5, 4, prompt=(7,))]
    tokens = [sample(LOGITS, params, past).token_id for past in pasts]
    assert len(set(tokens)) == 1
    # A row of a batch is a view; its neighbours are nothing to it.
    batch = torch.stack([torch.full((8,), torch.nan), LOGITS, torch.full((8,), torch.inf)])
    assert sample(batch[1], params, at(3)).token_id == tokens[0]
    strided = torch.stack([LOGITS, -LOGITS], dim=1)[:, 0]
    assert sample(strided, params, at(3)).token_id == tokens[0]


def test_seeds_and_indices_are_independent() -> None:
    """Neighbouring pairs agree as often as two independent draws would: 1 in 4."""
    flat = torch.zeros(4)

    def token(seed: int, index: int) -> int:
        return sample(flat, SamplingParams(temperature=1.0, seed=seed), at(index)).token_id

    for step in ((1, 0), (0, 1), (1, -1)):
        pairs = [(seed, index) for seed in range(40) for index in range(1, 26)]
        same = sum(token(seed, index) == token(seed + step[0], index + step[1]) for seed, index in pairs)
        assert abs(same - 250) < 5 * math.sqrt(1000 * 0.25 * 0.75), step


def test_sampling_does_not_touch_the_history_or_torch_s_generator() -> None:
    past = history(1, 2, 2, prompt=(3,))
    state = torch.get_rng_state()
    sample(LOGITS, SamplingParams(temperature=1.0, repetition_penalty=1.3, presence_penalty=1.0), past)
    assert past == history(1, 2, 2, prompt=(3,))
    assert torch.equal(torch.get_rng_state(), state)


# --- penalties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # Tokens:               0: only prompt  1: once  2: three times  3: prompt, twice  4: never; logits below.
        ({}, [2.0, 1.5, -1.0, -0.5, 0.5]),
        ({"repetition_penalty": 1.25}, [2.0 / 1.25, 1.5 / 1.25, -1.0 * 1.25, -0.5 * 1.25, 0.5]),
        ({"repetition_penalty": 0.5}, [2.0 / 0.5, 1.5 / 0.5, -1.0 * 0.5, -0.5 * 0.5, 0.5]),
        ({"presence_penalty": 0.7}, [2.0, 1.5 - 0.7, -1.0 - 0.7, -0.5 - 0.7, 0.5]),
        ({"presence_penalty": -0.7}, [2.0, 1.5 + 0.7, -1.0 + 0.7, -0.5 + 0.7, 0.5]),
        ({"frequency_penalty": 0.3}, [2.0, 1.5 - 0.3, -1.0 - 0.9, -0.5 - 0.6, 0.5]),
        (
            {"repetition_penalty": 1.25, "presence_penalty": 0.7, "frequency_penalty": 0.3},
            [1.6, 1.2 - 0.7 - 0.3, -1.25 - 0.7 - 0.9, -0.625 - 0.7 - 0.6, 0.5],
        ),
    ],
)
def test_penalties(params: dict[str, float], expected: list[float]) -> None:
    """Repetition counts the prompt, presence and frequency only the answer; repetition comes first."""
    past = history(1, 2, 3, 2, 3, 2, prompt=(0, 3))
    found = [adjusted([2.0, 1.5, -1.0, -0.5, 0.5], token, SamplingParams(**params), past) for token in range(5)]
    assert found == pytest.approx(expected, abs=1e-5)


def test_penalties_apply_before_sampling() -> None:
    params = {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    past = history(3, 3, 1)
    logits = LOGITS.tolist()
    logits[3] -= 0.5 + 2 * 0.25
    logits[1] -= 0.5 + 0.25
    drawn = Counter(sample(LOGITS, SamplingParams(seed=s, **params), past).token_id for s in range(2000))
    assert_drawn_from(brute_force(logits, temperature=0.8), drawn)


def test_no_penalty_without_a_history() -> None:
    params = SamplingParams(presence_penalty=2.0, frequency_penalty=2.0)
    assert sample(LOGITS, params, history(prompt=(3,))).token_id == 3


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_stop_tokens_are_banned_before_min_tokens(index: int) -> None:
    options = {"min_tokens": 2, "stop_token_ids": frozenset({3, 1})}
    banned = (3, 1) if index < 2 else ()
    logits = [-math.inf if token_id in banned else logit for token_id, logit in enumerate(LOGITS.tolist())]
    assert sample(LOGITS, SamplingParams(**options), at(index)).token_id == (6 if banned else 3)  # type: ignore[arg-type]
    drawn = Counter(
        sample(LOGITS, SamplingParams(temperature=1.0, seed=seed, **options), at(index)).token_id  # type: ignore[arg-type]
        for seed in range(DRAWS)
    )
    assert_drawn_from(brute_force(logits), drawn)


# --- log-probabilities -------------------------------------------------------------------------------------------


def test_no_logprobs_unless_asked_for() -> None:
    assert sample(LOGITS, SamplingParams(), at(0)) == (3, None, [])
    token = sample(LOGITS, SamplingParams(top_logprobs=0), at(0))
    assert token.logprob == pytest.approx(math.log(0.30), abs=1e-5)
    assert token.top_logprobs == []


def test_logprobs_are_the_model_s_own() -> None:
    """Of the distribution before temperature, filters, penalties and forbidden tokens."""
    params = SamplingParams(
        temperature=0.5,
        top_k=2,
        repetition_penalty=2.0,
        presence_penalty=1.0,
        min_tokens=5,
        stop_token_ids=frozenset({3}),
        top_logprobs=3,
    )
    token = sample(LOGITS + 4.0, params, history(1, prompt=(6,)))
    assert token.logprob == pytest.approx(math.log(PROBS[token.token_id]), abs=1e-5)
    assert token.token_id != 3
    assert [token_id for token_id, _ in token.top_logprobs] == [3, 1, 6]
    assert [p for _, p in token.top_logprobs] == pytest.approx([math.log(p) for p in (0.30, 0.22, 0.18)], abs=1e-5)


# --- the rest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        [0.0, math.nan, 1.0],
        [math.nan] * 3,
        [0.0, math.inf, 1.0],
        [-math.inf] * 3,
        [math.nan, math.inf, -math.inf],
    ],
)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 1, "top_p": 0.5}])
def test_logits_that_are_not_finite(bad: list[float], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="not finite"):
        sample(torch.tensor(bad), SamplingParams(**options), at(0))
    with pytest.raises(ValueError, match="not finite"):
        sample(torch.tensor(bad), SamplingParams(presence_penalty=1.0, **options), history(0))


def test_logits_are_not_modified() -> None:
    logits = LOGITS.clone()
    past = history(3, 3, prompt=(1,))
    options = {
        "repetition_penalty": 1.3,
        "presence_penalty": 1.0,
        "frequency_penalty": 1.0,
        "min_tokens": 9,
        "stop_token_ids": frozenset({6}),
        "top_logprobs": 2,
    }
    for name, value in options.items():
        for temperature in (0.0, 1.0):
            sample(logits, SamplingParams(temperature=temperature, **{name: value}), past)  # type: ignore[arg-type]
            assert torch.equal(logits, LOGITS), name
    sample(logits, SamplingParams(**options), past)  # type: ignore[arg-type]
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize(
    ("output", "min_tokens", "max_tokens", "expected"),
    [
        ((5,), 0, 10, ""),
        ((7,), 0, 10, "stop"),
        ((7, 5), 0, 10, ""),  # the new token counts, not an old one
        ((5, 6, 8), 0, 3, "length"),
        ((5, 6), 0, 3, ""),
        ((5, 6, 7), 0, 3, "stop"),  # rather than "length"
        ((7,), 0, 1, "stop"),
        ((5,), 0, 1, "length"),
        ((7,), 1, 10, ""),  # min_tokens is how many come before a stop token
        ((5, 7), 1, 10, "stop"),
        ((5, 7), 2, 10, ""),
        ((5, 5, 7), 2, 10, "stop"),
        ((5, 7), 5, 2, "length"),
    ],
)
def test_finish_reason(output: tuple[int, ...], min_tokens: int, max_tokens: int, expected: str) -> None:
    params = SamplingParams(min_tokens=min_tokens, max_tokens=max_tokens, stop_token_ids=frozenset({7, 9}))
    assert finish_reason(output[-1], history(*output), params) == expected


def test_a_stop_token_that_may_be_sampled_may_also_stop() -> None:
    """`sample` bans up to exactly the token at which `finish_reason` stops."""
    params = SamplingParams(min_tokens=3, max_tokens=10, stop_token_ids=frozenset({3}))
    past, reasons = history(), []
    while not reasons or not reasons[-1]:
        token = sample(LOGITS, params, past).token_id
        past.append(token)
        reasons.append(finish_reason(token, past, params))
    assert reasons == ["", "", "", "stop"]


def test_params_of_an_empty_message_are_all_off() -> None:
    off = SamplingParams.of(worker_pb2.SamplingParams(max_tokens=256))
    assert off == SamplingParams()
    assert off.top_logprobs is None


def test_params_of_a_full_message() -> None:
    message = worker_pb2.SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        seed=2**64 - 1,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        max_tokens=9,
        min_tokens=4,
        stop_token_ids=[5, 6, 5],
        logprobs=True,
        top_logprobs=3,
    )
    assert SamplingParams.of(message) == SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        seed=2**64 - 1,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        max_tokens=9,
        min_tokens=4,
        stop_token_ids=frozenset({5, 6}),
        top_logprobs=3,
    )


@pytest.mark.parametrize(("logprobs", "top", "expected"), [(False, 5, None), (True, 0, 0), (True, 5, 5)])
def test_params_of_logprobs(logprobs: bool, top: int, expected: int | None) -> None:
    message = worker_pb2.SamplingParams(max_tokens=1, logprobs=logprobs, top_logprobs=top)
    assert SamplingParams.of(message).top_logprobs == expected
