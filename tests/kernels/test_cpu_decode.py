"""C decode attention against the reference, and the promise that a row's bits are its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvferry.kernels.cpu import NativeKernels, load
from kvferry.kernels.packed import DecodeBatch
from kvferry.kernels.reference import ReferenceKernels

RATIO = 1e-3
ONE_TERM_RATIOS = {0.0: 1e-2, 0.3: 0.1, 1.0: 0.3}
"""By the strength of queries."""
reference = ReferenceKernels()
Check = Callable[[str, Tensor, Tensor, float], None]
MakeCache = Callable[..., Any]


@pytest.fixture
def one_term(native: NativeKernels) -> NativeKernels:
    return load(terms=1)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_decode_attention(
    native: NativeKernels, make_cache: MakeCache, assert_close: Check, head_dim: int, group: int
) -> None:
    """Unequal contexts, blocks out of order, a one-token tail, a full tail and an empty prefix in one batch."""
    cache = make_cache(head_dim=head_dim, unused=(4,))
    batch = cache.batch([[7, 0, 3, 8, 1], [2], [], [5, 6]], [1, 128, 37, 2], slots=[2, 0, 3, 1])
    query = cache.query(group, 4)
    for layer in (0, 1):
        expected = reference.decode_attention(query, batch, layer=layer, scale=cache.scale)
        actual = native.decode_attention(query, batch, layer=layer, scale=cache.scale)
        for row in range(4):
            assert_close(f"layer {layer} row {row}", expected[row], actual[row], RATIO)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
def test_one_term(
    make_cache: MakeCache, assert_close: Check, one_term: NativeKernels, head_dim: int, group: int
) -> None:
    """One byte a number. A score is known to 7 bits of its largest term, so its error grows with the query."""
    cache = make_cache(head_dim=head_dim, unused=(4,))
    batch = cache.batch([[7, 0, 3, 8, 1], [2], [], [5, 6]], [1, 128, 37, 2], slots=[2, 0, 3, 1])
    for strength, ratio in ONE_TERM_RATIOS.items():
        query = torch.randn(4, 2 * group, head_dim) * strength
        expected = reference.decode_attention(query, batch, layer=1, scale=cache.scale)
        actual = one_term.decode_attention(query, batch, layer=1, scale=cache.scale)
        for row in range(4):
            assert_close(f"strength {strength} row {row}", expected[row], actual[row], ratio if row != 2 else 1e-5)


@pytest.mark.usefixtures("two_threads")
def test_one_term_row_has_the_same_bits_alone(make_cache: MakeCache, one_term: NativeKernels) -> None:
    cache = make_cache(head_dim=64, kv_heads=3, blocks=12)
    tables, tails, query = [[0, 1, 2, 3, 4, 5, 6], [7], [], [8, 9]], [77, 1, 128, 30], cache.query(3, 4)
    together = one_term.decode_attention(query, cache.batch(tables, tails), layer=1, scale=cache.scale)
    torch.set_num_threads(1)
    for i in range(4):
        batch = cache.batch([tables[i]], [tails[i]], slots=[i])
        assert torch.equal(one_term.decode_attention(query[i, None], batch, layer=1, scale=cache.scale)[0], together[i])


@pytest.mark.parametrize(("block_size", "sink_tokens", "kv_heads"), [(32, 0, 1), (32, 16, 3), (96, 1, 5), (1024, 4, 1)])
def test_odd_shapes(
    native: NativeKernels,
    make_cache: MakeCache,
    assert_close: Check,
    block_size: int,
    sink_tokens: int,
    kv_heads: int,
) -> None:
    cache = make_cache(head_dim=64, kv_heads=kv_heads, block_size=block_size, sink_tokens=sink_tokens, blocks=20)
    tables = [[19, 3], list(range(18)), [11]]
    batch = cache.batch(tables, [block_size, 1, block_size // 2 + 1])
    query = cache.query(3, 3)
    expected = reference.decode_attention(query, batch, layer=1, scale=cache.scale)
    actual = native.decode_attention(query, batch, layer=1, scale=cache.scale)
    assert_close("out", expected, actual, RATIO)


def test_one_token_context(native: NativeKernels, make_cache: MakeCache, assert_close: Check) -> None:
    """Attention over one token is its V."""
    cache = make_cache()
    out = native.decode_attention(cache.query(3, 1), cache.batch([[]], [1]), layer=0, scale=cache.scale)
    values = cache.tails[0, 0, 1, :, 0].float().repeat_interleave(3, dim=0)
    assert_close("out", values[None], out, 1e-6)


def test_long_context(native: NativeKernels, make_cache: MakeCache, assert_close: Check) -> None:
    """More pages than a piece has, ending in the middle of one."""
    cache = make_cache(head_dim=128, kv_heads=1, num_layers=1, blocks=37)
    table = torch.randperm(37).tolist()
    batch = cache.batch([table], [100])
    query = cache.query(4, 1)
    expected = reference.decode_attention(query, batch, layer=0, scale=cache.scale)
    assert_close("out", expected, native.decode_attention(query, batch, layer=0, scale=cache.scale), RATIO)


@pytest.mark.parametrize(("strength", "ratio"), [(0.0, 1e-4), (1e-4, 1e-4), (1.0, RATIO), (30.0, 5e-3), (300.0, 5e-2)])
def test_flat_and_sharp_softmax(
    native: NativeKernels, make_cache: MakeCache, assert_close: Check, strength: float, ratio: float
) -> None:
    """Equal scores, and maxima that rise by hundreds from page to page.

    A score is known to 15 bits of its largest term, so the error of a probability grows with the scores: at strength 30
    they reach 600.
    """
    cache = make_cache(head_dim=64, blocks=5)
    batch = cache.batch([[4, 2, 0, 1, 3]], [64])
    query = torch.randn(1, 4, 64) * strength
    expected = reference.decode_attention(query, batch, layer=0, scale=cache.scale)
    actual = native.decode_attention(query, batch, layer=0, scale=cache.scale)
    assert_close("out", expected, actual, ratio)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_query_dtype(native: NativeKernels, make_cache: MakeCache, assert_close: Check, dtype: torch.dtype) -> None:
    cache = make_cache()
    batch, query = cache.batch([[1, 2]], [5]), cache.query(2, 1).to(dtype)
    expected = native.decode_attention(query.float(), batch, layer=0, scale=cache.scale).to(dtype)
    actual = native.decode_attention(query, batch, layer=0, scale=cache.scale)
    assert actual.dtype == dtype and torch.equal(actual, expected)


@pytest.mark.usefixtures("two_threads")
def test_a_row_has_the_same_bits_in_any_company(native: NativeKernels, make_cache: MakeCache) -> None:
    """Alone or in a batch, at any place of it, in other slots and blocks, on one thread or two."""
    cache = make_cache(head_dim=64, kv_heads=3, blocks=12, slots=6)
    tables = [[0, 1, 2, 3, 4, 5, 6], [7], [], [8, 9]]
    tails = [77, 1, 128, 30]
    query = cache.query(3, 4)

    def run(q: Tensor, batch: DecodeBatch) -> Tensor:
        return native.decode_attention(q, batch, layer=1, scale=cache.scale)

    together = run(query, cache.batch(tables, tails))
    for _ in range(5):
        assert torch.equal(run(query, cache.batch(tables, tails)), together)

    order = [2, 0, 3, 1]
    shuffled = cache.batch([tables[i] for i in order], [tails[i] for i in order], slots=order)
    assert torch.equal(run(query[order], shuffled), together[order])

    torch.set_num_threads(1)
    assert torch.equal(run(query, cache.batch(tables, tails)), together)
    for i in range(4):
        alone = cache.batch([tables[i]], [tails[i]], slots=[i])
        assert torch.equal(run(query[i, None], alone)[0], together[i])

    torch.set_num_threads(2)
    moved_pool, moved_sinks, moved_tails = (torch.empty_like(x) for x in (cache.pool, cache.sinks, cache.tails))
    places = torch.randperm(12)
    moved_pool[places] = cache.pool
    moved_sinks[5], moved_tails[5] = cache.sinks[0], cache.tails[0]
    moved = dataclasses.replace(cache, pool=moved_pool, sinks=moved_sinks, tails=moved_tails)
    batch = moved.batch([places[tables[0]].tolist()], [tails[0]], slots=[5])
    assert torch.equal(run(query[0, None], batch)[0], together[0])


def test_pool_and_sink_views(native: NativeKernels, make_cache: MakeCache) -> None:
    """A pool that is a slice of a larger one, at the odd offset that bytes may have."""
    cache = make_cache()
    size = cache.pool.shape[1]
    big = torch.empty(9, size + 100, dtype=torch.uint8)
    big[:, 31 : 31 + size] = cache.pool
    query, batch = cache.query(2, 1), cache.batch([[3, 6]], [9])
    expected = native.decode_attention(query, batch, layer=1, scale=cache.scale)
    view = dataclasses.replace(batch, pool=big[:, 31 : 31 + size])
    assert torch.equal(native.decode_attention(query, view, layer=1, scale=cache.scale), expected)


def test_tensors_of_a_batch_may_change_between_calls(native: NativeKernels, make_cache: MakeCache) -> None:
    cache = make_cache()
    query, batch = cache.query(2, 1), cache.batch([[3, 6]], [9])
    native.decode_attention(query, batch, layer=0, scale=cache.scale)
    batch.tail_lens[0], batch.block_tables[0, 1] = 10, 5
    fresh = cache.batch([[3, 5]], [10])
    assert torch.equal(
        native.decode_attention(query, batch, layer=1, scale=cache.scale),
        native.decode_attention(query, fresh, layer=1, scale=cache.scale),
    )


def test_nan_in_the_query_is_not_hidden(native: NativeKernels, make_cache: MakeCache) -> None:
    cache = make_cache()
    query, batch = cache.query(3, 2), cache.batch([[3, 6], [1]], [9, 9])
    clean = native.decode_attention(query, batch, layer=0, scale=cache.scale)
    query[0, 4, 7] = torch.nan
    out = native.decode_attention(query, batch, layer=0, scale=cache.scale)
    assert out[0, 4].isnan().all()
    out[0, 4] = clean[0, 4]
    assert torch.equal(out, clean)


def test_empty_batch(native: NativeKernels, make_cache: MakeCache) -> None:
    cache = make_cache()
    none = dataclasses.replace(
        cache.batch([[1]], [1]),
        block_tables=torch.zeros(0, 1, dtype=torch.int32),
        **{name: torch.zeros(0, dtype=torch.int32) for name in ("num_blocks", "slots", "tail_lens")},
    )
    out = native.decode_attention(torch.zeros(0, 4, 64), none, layer=0, scale=1.0)
    assert out.shape == (0, 4, 64)


def test_wrong_arguments_are_refused(native: NativeKernels, make_cache: MakeCache) -> None:
    cache = make_cache()
    query, good = cache.query(2, 1), cache.batch([[3, 6]], [9])

    def refused(match: str, q: Tensor = query, layer: int = 0, **changes: Tensor) -> None:
        with pytest.raises(ValueError, match=match):
            native.decode_attention(q, dataclasses.replace(good, **changes), layer=layer, scale=0.1)

    def int32(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    refused("block id", block_tables=int32(3, 9)[None])
    refused("block id", block_tables=int32(-1, 3)[None])
    refused("slot", slots=int32(4))
    refused("num_blocks, tail_lens", num_blocks=int32(3))
    refused("num_blocks, tail_lens", tail_lens=int32(0))
    refused("num_blocks, tail_lens", tail_lens=int32(129))
    refused("block_tables must be", block_tables=good.block_tables.long())
    refused("slots must be", slots=int32(1, 2))
    refused("pool must be", pool=cache.pool[..., :-1])
    refused("contiguous", pool=cache.pool.T.contiguous().T)
    refused("tails must be", tails=cache.tails.float())
    refused("sinks must be", sinks=cache.sinks[:2])
    refused("cannot share", q=torch.zeros(1, 3, 64))
    refused("layer 2", layer=2)
    for rule, match in (({"window": 0}, "window 0"), ({"softcap": 0.0}, "softcap 0.0")):
        with pytest.raises(ValueError, match=match):
            native.decode_attention(query, good, layer=0, scale=0.1, **rule)
