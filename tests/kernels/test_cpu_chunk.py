"""C chunk attention against the reference, and the promise that a row's bits are its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvferry.kernels.cpu import NativeKernels
from kvferry.kernels.reference import ReferenceKernels

RATIO = 2e-5
reference = ReferenceKernels()
Check = Callable[[str, Tensor, Tensor, float], None]
MakeCache = Callable[..., Any]


def own_kv(cache: Any, tokens: int) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, cache.layout.num_kv_heads, tokens, cache.layout.head_dim).half()
    return k, v


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("table", [[], [5, 0, 3]], ids=["no prefix", "prefix"])
def test_chunk_attention(
    native: NativeKernels,
    make_cache: MakeCache,
    assert_close: Check,
    head_dim: int,
    group: int,
    table: list[int],
) -> None:
    cache = make_cache(head_dim=head_dim, blocks=6, unused=(1, 2, 4))
    n = 37
    query, (k, v) = cache.query(group, n).transpose(0, 1), own_kv(cache, n)
    prefix = cache.prefix(table, slot=1)
    for layer in (0, 1):
        expected = reference.chunk_attention(query, k, v, prefix, layer=layer, scale=cache.scale)
        actual = native.chunk_attention(query, k, v, prefix, layer=layer, scale=cache.scale)
        assert_close(f"layer {layer}", expected, actual, RATIO)


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 127, 128, 200])
@pytest.mark.parametrize("sink_tokens", [0, 4, 16])
def test_tokens(
    native: NativeKernels, make_cache: MakeCache, assert_close: Check, tokens: int, sink_tokens: int
) -> None:
    cache = make_cache(block_size=64, sink_tokens=sink_tokens, kv_heads=3)
    query, (k, v) = cache.query(3, tokens).transpose(0, 1), own_kv(cache, tokens)
    for table in ([], [8], [2, 7]):
        prefix = cache.prefix(table)
        expected = reference.chunk_attention(query, k, v, prefix, layer=1, scale=cache.scale)
        actual = native.chunk_attention(query, k, v, prefix, layer=1, scale=cache.scale)
        assert_close(f"{len(table)} blocks", expected, actual, RATIO)


@pytest.mark.parametrize("strength", [0.0, 30.0, 300.0])
def test_flat_and_sharp_softmax(
    native: NativeKernels, make_cache: MakeCache, assert_close: Check, strength: float
) -> None:
    cache = make_cache()
    query, (k, v) = torch.randn(4, 40, 64) * strength, own_kv(cache, 40)
    prefix = cache.prefix([3, 1])
    expected = reference.chunk_attention(query, k, v, prefix, layer=0, scale=cache.scale)
    actual = native.chunk_attention(query, k, v, prefix, layer=0, scale=cache.scale)
    assert_close("out", expected, actual, 1e-3)


def test_strides(native: NativeKernels, make_cache: MakeCache) -> None:
    """Query, K and V as views of [T, H, D], and bf16."""
    cache = make_cache()
    n = 21
    query, (k, v) = cache.query(2, n).transpose(0, 1), own_kv(cache, n)
    prefix = cache.prefix([4])
    expected = native.chunk_attention(query.contiguous(), k, v, prefix, layer=0, scale=cache.scale)
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    assert not query.is_contiguous() and not k.is_contiguous()
    assert torch.equal(native.chunk_attention(query, k, v, prefix, layer=0, scale=cache.scale), expected)
    rounded = query.bfloat16()
    out = native.chunk_attention(rounded, k, v, prefix, layer=0, scale=cache.scale)
    exact = native.chunk_attention(rounded.float(), k, v, prefix, layer=0, scale=cache.scale)
    assert out.dtype == torch.bfloat16 and torch.equal(out, exact.bfloat16())


@pytest.mark.usefixtures("two_threads")
def test_a_row_has_the_same_bits_in_any_company(native: NativeKernels, make_cache: MakeCache) -> None:
    """In a longer or shorter chunk, in other blocks, on one thread or two."""
    cache = make_cache(kv_heads=3, blocks=8)
    n = 128
    query, (k, v) = cache.query(3, n).transpose(0, 1).contiguous(), own_kv(cache, n)
    prefix = cache.prefix([6, 1, 3])

    def run(tokens: int) -> Tensor:
        return native.chunk_attention(
            query[:, :tokens], k[:, :tokens], v[:, :tokens], prefix, layer=1, scale=cache.scale
        )

    whole = run(n)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(run(n), whole)
        for tokens in (1, 5, 32, 50, 127):
            assert torch.equal(run(tokens), whole[:, :tokens])

    changed = query.clone()
    changed[:, 1::2] = 50.0
    mixed = native.chunk_attention(changed, k, v, prefix, layer=1, scale=cache.scale)
    assert torch.equal(mixed[:, ::2], whole[:, ::2])

    places = torch.randperm(8)
    pool = torch.empty_like(cache.pool)
    pool[places] = cache.pool
    moved = dataclasses.replace(prefix, pool=pool, table=places[prefix.table.long()].to(torch.int32))
    assert torch.equal(native.chunk_attention(query, k, v, moved, layer=1, scale=cache.scale), whole)


def test_later_tokens_are_invisible(native: NativeKernels, make_cache: MakeCache) -> None:
    cache = make_cache()
    query, (k, v) = cache.query(2, 64).transpose(0, 1), own_kv(cache, 64)
    prefix = cache.prefix([0])
    before = native.chunk_attention(query, k, v, prefix, layer=0, scale=cache.scale)
    k[:, 41:], v[:, 41:] = 100.0, -100.0
    after = native.chunk_attention(query, k, v, prefix, layer=0, scale=cache.scale)
    assert torch.equal(after[:, :41], before[:, :41])
    assert not torch.equal(after[:, 41:], before[:, 41:])


def test_nan_in_the_query_is_not_hidden(native: NativeKernels, make_cache: MakeCache) -> None:
    cache = make_cache()
    query, (k, v) = cache.query(2, 20).transpose(0, 1).contiguous(), own_kv(cache, 20)
    clean = native.chunk_attention(query, k, v, cache.prefix([3]), layer=0, scale=cache.scale)
    query[1, 7, 5] = torch.nan
    out = native.chunk_attention(query, k, v, cache.prefix([3]), layer=0, scale=cache.scale)
    assert out[1, 7].isnan().all()
    out[1, 7] = clean[1, 7]
    assert torch.equal(out, clean)


def test_agrees_with_decode(native: NativeKernels, make_cache: MakeCache, assert_close: Check) -> None:
    """The first decoded token after a prefill continues it."""
    cache = make_cache()
    n = 30
    query = cache.query(3, n).transpose(0, 1)
    k, v = cache.tails[2, 0, 0, :, :n], cache.tails[2, 0, 1, :, :n]
    rows = native.chunk_attention(query, k, v, cache.prefix([4, 1], slot=2), layer=0, scale=cache.scale)
    batch = cache.batch([[4, 1]], [n], slots=[2])
    step = native.decode_attention(query[:, -1][None], batch, layer=0, scale=cache.scale)
    assert_close("last row", rows[:, -1], step[0], 1e-3)


def test_wrong_arguments_are_refused(native: NativeKernels, make_cache: MakeCache) -> None:
    cache = make_cache()
    query, (k, v) = cache.query(2, 8).transpose(0, 1), own_kv(cache, 8)

    def refused(match: str, **changes: Any) -> None:
        arguments = {"query": query, "keys": k, "values": v, "prefix": cache.prefix([1]), "layer": 0}
        with pytest.raises(ValueError, match=match):
            native.chunk_attention(**{**arguments, **changes}, scale=0.1)

    refused("block id", prefix=cache.prefix([9]))
    refused("keys must be", keys=k.float())
    refused("values must be", values=v[:, :7])
    refused("cannot share", query=query[:3])
    refused("layer 2", layer=2)
    refused("layer -1", layer=-1)
    refused("table must be", prefix=dataclasses.replace(cache.prefix([1]), table=torch.tensor([1])))
