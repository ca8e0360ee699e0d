"""Attention over shares of a context and their merge: the reference against attention on the whole, the CPU kernels
against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.context_shares import cut_batch
from torch import Tensor

from kvferry.kernels.cpu import NativeKernels, load
from kvferry.kernels.packed import DecodeBatch, PackedKernels
from kvferry.kernels.presets import PRESETS
from kvferry.kernels.reference import ReferenceKernels
from kvferry.kernels.spec import LayerSpec, TensorSpec

RATIO = 1e-3
TABLES = [[7, 0, 3, 8, 1], [2], [], [5, 6]]
TAILS = [1, 128, 37, 2]
reference = ReferenceKernels()
Check = Callable[[str, Tensor, Tensor, float], None]
MakeCache = Callable[..., Any]


def split(kernels: PackedKernels, query: Tensor, batch: DecodeBatch, num_shares: int, **options: Any) -> Tensor:
    shares = [kernels.share_attention(query, share, **options) for share in cut_batch(batch, num_shares)]
    return kernels.merge_shares(torch.stack(shares))


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("num_shares", [1, 2, 3, 8])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 3), (80, 1), (128, 5), (32, 8)])
def test_merged_shares_are_the_whole(
    native: NativeKernels,
    make_cache: MakeCache,
    assert_close: Check,
    kernels: str,
    num_shares: int,
    softcap: float | None,
    head_dim: int,
    group: int,
) -> None:
    """Contexts shorter than the shares are many, and one without a block, in one batch."""
    cache = make_cache(head_dim=head_dim, unused=(4,))
    batch, query = cache.batch(TABLES, TAILS, slots=[2, 0, 3, 1]), cache.query(group, 4)
    options: Any = dict(layer=1, scale=cache.scale, softcap=softcap)
    whole = reference.decode_attention(query, batch, **options)
    by = reference if kernels == "reference" else native
    merged = split(by, query, batch, num_shares, **options)
    for row in range(4):
        assert_close(f"row {row}", whole[row], merged[row], 1e-5 if kernels == "reference" else RATIO)


FORMS = {
    **{name: PRESETS[name].layer for name in ("kv2", "kv3", "kv4", "kv16")},
    "k16-v2": LayerSpec(key=TensorSpec(bits=16), value=TensorSpec()),
    "k8-v4": LayerSpec(key=TensorSpec(bits=8), value=TensorSpec(bits=4)),
}


@pytest.mark.parametrize("form", FORMS)
def test_mixed_formats(native: NativeKernels, make_cache: MakeCache, assert_close: Check, form: str) -> None:
    """Layers of two formats in one pool; each share against the reference's, and all of them merged."""
    cache = make_cache(head_dim=64, kv_heads=3, overrides=((1, FORMS[form]),))
    batch, query = cache.batch([[3, 1, 4, 0, 8], [5, 2]], [9, 127]), cache.query(3, 2)
    for layer in (0, 1):
        options: Any = dict(layer=layer, scale=cache.scale)
        for share in cut_batch(batch, 2):
            expected = reference.share_attention(query, share, **options)
            actual = native.share_attention(query, share, **options)
            assert_close("out", expected[..., :-1], actual[..., :-1], RATIO)
            assert (expected[..., -1] - actual[..., -1]).abs().max() < 2e-3
        whole = native.decode_attention(query, batch, **options)
        assert_close("merged", whole, split(native, query, batch, 2, **options), 1e-5)


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_an_empty_share_is_nothing(native: NativeKernels, make_cache: MakeCache, kernels: str) -> None:
    """Zeros and -inf, and it changes no bit of what it is merged with, at any place."""
    by = reference if kernels == "reference" else native
    cache = make_cache()
    query, options = cache.query(2, 2), dict(layer=0, scale=cache.scale)
    whole, empty = cut_batch(cache.batch([[3], []], [9, 1]), 2)
    some, none = by.share_attention(query, whole, **options), by.share_attention(query, empty, **options)
    assert not none[..., :-1].any() and (none[..., -1] == -torch.inf).all()
    alone = by.merge_shares(some[None])
    assert alone.isfinite().all()
    assert torch.equal(by.merge_shares(torch.stack([none, some, none])), alone)
    assert not by.merge_shares(torch.stack([none, none])).any()


def test_one_share_has_the_bits_of_the_whole(native: NativeKernels, make_cache: MakeCache) -> None:
    """So a context of one block, which no other rank knows of, is not changed by the split."""
    cache = make_cache()
    query, batch, options = cache.query(2, 4), cache.batch(TABLES, TAILS), dict(layer=1, scale=cache.scale)
    assert torch.equal(split(native, query, batch, 1, **options), native.decode_attention(query, batch, **options))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("terms", [1, 2])
def test_a_row_has_the_same_bits_in_any_company(make_cache: MakeCache, terms: int) -> None:
    native = load(terms=terms)
    cache = make_cache(head_dim=64, kv_heads=3, blocks=12)
    tables, tails, query = [[0, 1, 2, 3, 4, 5, 6], [7], [], [8, 9]], [77, 1, 128, 30], cache.query(3, 4)
    options: Any = dict(layer=1, scale=cache.scale)
    together = split(native, query, cache.batch(tables, tails), 3, **options)
    torch.set_num_threads(1)
    for i in range(4):
        batch = cache.batch([tables[i]], [tails[i]], slots=[i])
        assert torch.equal(split(native, query[i, None], batch, 3, **options)[0], together[i])


@pytest.mark.parametrize("strength", [1e-4, 30.0, 3000.0])
def test_shares_of_very_different_weight(native: NativeKernels, strength: float) -> None:
    """Log-sum-exps that differ by thousands: what weighs nothing does not matter, and nothing overflows."""
    generator = torch.Generator().manual_seed(1)
    shares = torch.randn(5, 7, 3, 65, generator=generator)
    shares[..., -1] *= strength
    shares[2, ..., -1] = -torch.inf
    exact = reference.merge_shares(shares.double())
    assert torch.allclose(native.merge_shares(shares).double(), exact, atol=1e-5)
    assert torch.allclose(reference.merge_shares(shares).double(), exact, atol=1e-5)


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_nan_is_not_hidden(native: NativeKernels, make_cache: MakeCache, kernels: str) -> None:
    by = reference if kernels == "reference" else native
    shares = torch.randn(2, 2, 4, 65)
    clean = by.merge_shares(shares)
    shares[1, 1, 2] = torch.nan
    merged = by.merge_shares(shares)
    assert merged[1, 2].isnan().all()
    merged[1, 2] = clean[1, 2]
    assert torch.equal(merged, clean)


def test_a_whole_batch_still_needs_its_tail(native: NativeKernels, make_cache: MakeCache) -> None:
    cache = make_cache()
    _, share = cut_batch(cache.batch([[3, 6]], [9]), 2)
    with pytest.raises(ValueError, match="tail_lens"):
        native.decode_attention(cache.query(2, 1), share, layer=0, scale=0.1)
    with pytest.raises(ValueError, match="shares must be"):
        native.merge_shares(torch.zeros(2, 1, 4, 65, dtype=torch.float64))
