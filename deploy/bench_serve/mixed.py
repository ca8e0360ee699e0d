"""A workload with requests that are meant to go wrong, so that every way a request can end is under load."""

from __future__ import annotations

from dataclasses import dataclass, replace

import grpc
import numpy as np

from kvferry.deploy.bench_serve.workload import PlannedRequest, Stream, TokenIds, TokenSource, draw_lengths

_NO_TOKENS: TokenIds = np.empty(0, np.uint32)
_BEYOND_EVERY_VOCABULARY = 2**32 - 1
_LATEST_CANCEL = 4


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Shares of all requests; what is left over is short and good."""

    long: float = 0.2
    cancelled: float = 0.1
    too_short_deadline: float = 0.1
    bad: float = 0.1

    def __post_init__(self) -> None:
        shares = (self.long, self.cancelled, self.too_short_deadline, self.bad)
        if min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise ValueError("the shares of a mixed workload must be 0 or more and at most 1 together")


def mixed_requests(
    tokens: TokenSource,
    *,
    count: int,
    mix: Mix,
    input_len: int,
    long_input_len: int,
    output_len: int,
    short_deadline_s: float,
    range_ratio: float = 0.0,
) -> list[PlannedRequest]:
    """In an order that depends on the seed; how many of each kind does not."""
    if mix.cancelled and output_len * (1 - range_ratio) < 2:
        raise ValueError("an answer that is cancelled on its way needs an --output-len of at least 2")
    lengths = tokens.generator(Stream.LENGTHS)
    short = draw_lengths(lengths, input_len, range_ratio, count)
    long = draw_lengths(lengths, long_input_len, range_ratio, count)
    outputs = draw_lengths(lengths, output_len, range_ratio, count)
    order = tokens.generator(Stream.ORDER)

    def request(index: int, kind: str) -> PlannedRequest:
        is_long = kind in ("long", "deadline")
        good = PlannedRequest(
            token_ids=tokens.take(Stream.UNIQUE, index, (long if is_long else short)[index]),
            max_tokens=outputs[index],
            kind=kind,
        )
        if kind == "deadline":
            return replace(good, expected=grpc.StatusCode.DEADLINE_EXCEEDED, timeout_s=short_deadline_s)
        if kind == "cancelled":
            after = int(order.integers(min(_LATEST_CANCEL, good.max_tokens)))
            return replace(good, expected=grpc.StatusCode.CANCELLED, cancel_after=after)
        return good if kind in ("short", "long") else _bad(good, kind)

    kinds = np.array(_kinds(count, mix))
    order.shuffle(kinds)
    return [request(index, str(kind)) for index, kind in enumerate(kinds)]


BAD_KINDS = ("bad-empty", "bad-token", "bad-model", "bad-temperature", "bad-max-tokens")


def _kinds(count: int, mix: Mix) -> list[str]:
    kinds: list[str] = []
    for kind, share in (("long", mix.long), ("cancelled", mix.cancelled), ("deadline", mix.too_short_deadline)):
        kinds += [kind] * round(share * count)
    kinds += [BAD_KINDS[i % len(BAD_KINDS)] for i in range(round(mix.bad * count))]
    return (kinds + ["short"] * count)[:count]


def _bad(good: PlannedRequest, kind: str) -> PlannedRequest:
    good = replace(good, expected=grpc.StatusCode.INVALID_ARGUMENT)
    match kind:
        case "bad-empty":
            return replace(good, token_ids=_NO_TOKENS)
        case "bad-token":
            return replace(good, token_ids=np.append(good.token_ids, np.uint32(_BEYOND_EVERY_VOCABULARY)))
        case "bad-model":
            return replace(good, model="no-such-model", expected=grpc.StatusCode.NOT_FOUND)
        case "bad-temperature":
            return replace(good, temperature=-1.0)
        case "bad-max-tokens":
            return replace(good, max_tokens=2**31)
    raise ValueError(f"no such kind: {kind}")
