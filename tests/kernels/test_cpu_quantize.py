"""The C quantizer against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvferry.kernels.cpu import NativeKernels
from kvferry.kernels.layout import page_bytes, split_page
from kvferry.kernels.reference import dequantize_pages, quantize_pages


def quantize(native: NativeKernels, k: Tensor, v: Tensor, sink_tokens: int = 0) -> Tensor:
    heads, tokens, head_dim = k.shape
    out = torch.empty(heads, tokens // 32, page_bytes(head_dim), dtype=torch.uint8)
    native.quantize_block(k, v, sink_tokens=sink_tokens, out=out)
    return out


def random_kv(heads: int, tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    channels = torch.rand(head_dim).mul(3).exp()
    return (torch.randn(heads, tokens, head_dim) * channels).half(), torch.randn(heads, tokens, head_dim).half()


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize(("heads", "tokens", "sink_tokens"), [(1, 32, 0), (3, 128, 4), (5, 96, 16), (8, 1024, 1)])
def test_quantize_block(native: NativeKernels, head_dim: int, heads: int, tokens: int, sink_tokens: int) -> None:
    k, v = random_kv(heads, tokens, head_dim)
    pages = quantize(native, k, v, sink_tokens)
    reference = quantize_pages(k, v, sink_tokens=sink_tokens)
    ours, theirs = split_page(pages, head_dim), split_page(reference, head_dim)
    names = ("k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero")
    for name, a, b in zip(names, ours, theirs, strict=True):
        if a.dtype == torch.uint8:
            assert (a != b).float().mean() <= 1e-3, name
        else:
            # One fp16 step for almost all; sums in another order turn a rare tie of codes, and with it a fit.
            off = (a.float() - b.float()).abs() > b.float().abs() * 2**-10 + 2**-14
            assert off.float().mean() <= 2e-3, name
    for x, a, b in zip((k, v), dequantize_pages(pages, head_dim), dequantize_pages(reference, head_dim), strict=True):
        x, a, b = (y.float()[:, sink_tokens:] for y in (x, a, b))
        assert (a - x).square().mean() <= 1.0001 * (b - x).square().mean()


def test_sinks_are_zero(native: NativeKernels) -> None:
    k, v = random_kv(2, 64, 64)
    k_codes, _, _, v_codes, v_scale, v_zero = split_page(quantize(native, k, v, 7), 64)
    for x in (k_codes, v_codes, v_scale, v_zero):
        assert not x[:, 0, :7].any()
    k[:, :7], v[:, :7] = 1000.0, -1000.0
    assert torch.equal(k_codes, split_page(quantize(native, k, v, 7), 64)[0])


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -300.5, 65504.0, 6e-8])
def test_constant_and_extreme_groups(native: NativeKernels, value: float) -> None:
    x = torch.full((2, 32, 64), value).half()
    assert torch.equal(quantize(native, x, x), quantize_pages(x, x))


def test_alternating_extremes(native: NativeKernels) -> None:
    x = torch.tensor([65504.0, -65504.0]).half().repeat(16, 32).view(1, 32, 32)
    x[:, ::2] = -x[:, ::2]
    for page in (split_page(quantize(native, x, x), 32), split_page(quantize_pages(x, x), 32)):
        assert page[1].isfinite().all() and page[2].isfinite().all()
    assert torch.equal(quantize(native, x, x), quantize_pages(x, x))


def test_tiny_values(native: NativeKernels) -> None:
    k, v = (x * 1e-6 for x in random_kv(2, 32, 32))
    ours, theirs = quantize(native, k, v), quantize_pages(k, v)
    for a, b in zip(dequantize_pages(ours, 32), dequantize_pages(theirs, 32), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("token", [0, 127])
def test_not_finite_is_refused(native: NativeKernels, bad: float, where: str, token: int) -> None:
    """A sink (token 0) counts too: it goes to the store as well."""
    k, v = random_kv(2, 128, 64)
    (k if where == "keys" else v)[1, token, 63] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(native, k, v, sink_tokens=4)


def test_strides(native: NativeKernels) -> None:
    """K and V as a view of a tail, and as a transposed [T, H, D]."""
    k, v = random_kv(3, 128, 64)
    expected = quantize(native, k, v)
    wide = torch.empty(2, 5, 200, 64, dtype=torch.float16)
    wide[0, 1:4, 7:135], wide[1, 1:4, 7:135] = k, v
    assert torch.equal(quantize(native, wide[0, 1:4, 7:135], wide[1, 1:4, 7:135]), expected)
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    assert torch.equal(quantize(native, k, v), expected)


@pytest.mark.usefixtures("two_threads")
def test_same_bytes_for_any_threads(native: NativeKernels) -> None:
    k, v = random_kv(4, 256, 128)
    two = quantize(native, k, v, 4)
    torch.set_num_threads(1)
    assert torch.equal(quantize(native, k, v, 4), two)
    for head in range(4):
        assert torch.equal(quantize(native, k[head, None], v[head, None], 4)[0], two[head])


def test_pages_are_independent(native: NativeKernels) -> None:
    """Blocks of other sizes hold the same pages."""
    k, v = random_kv(2, 128, 96)
    whole = quantize(native, k, v)
    for page in range(4):
        part = slice(32 * page, 32 * page + 32)
        assert torch.equal(quantize(native, k[:, part], v[:, part])[:, 0], whole[:, page])


def test_wrong_arguments_are_refused(native: NativeKernels) -> None:
    k, v = random_kv(2, 64, 64)
    out = torch.empty(2, 2, page_bytes(64), dtype=torch.uint8)
    with pytest.raises(ValueError, match="keys must be"):
        native.quantize_block(k.float(), v, sink_tokens=0, out=out)
    with pytest.raises(ValueError, match="values must be"):
        native.quantize_block(k, v[:1], sink_tokens=0, out=out)
    with pytest.raises(ValueError, match="out must be"):
        native.quantize_block(k, v, sink_tokens=0, out=out[:1])
    with pytest.raises(ValueError, match="contiguous"):
        native.quantize_block(k.mT.contiguous().mT, v, sink_tokens=0, out=out)
    with pytest.raises(ValueError, match="cannot pack 50 tokens"):
        native.quantize_block(k[:, :50], v[:, :50], sink_tokens=0, out=out)
    with pytest.raises(ValueError, match="head_dim"):
        k, v = random_kv(1, 32, 160)
        native.quantize_block(k, v, sink_tokens=0, out=torch.empty(1, 1, 24 * 160, dtype=torch.uint8))
