"""The C quantizer against the reference: the same bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvferry.kernels.cpu import NativeKernels
from kvferry.kernels.page import Packed, PageFormat
from kvferry.kernels.reference import quantize_pages
from kvferry.kernels.spec import LayerSpec, TensorSpec

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
TENSORS = [
    TensorSpec(bits=bits, group_size=group, scales=scales)
    for bits, group, scales in itertools.product((2, 4, 8), (16, 32, 64), ("fp16", "8bit"))
    if (bits, scales) != (8, "8bit")
] + [TensorSpec(bits=16)]
LAYERS = [LayerSpec(key=key, value=value) for key, value in zip(TENSORS, TENSORS[5:] + TENSORS[:5], strict=True)]
"""Every tensor format once as K and once as V."""
LAYERS += [
    LayerSpec(key=TensorSpec(group_size=128, scales="8bit", boost=6), value=TensorSpec(group_size=128, scales="8bit")),
    LayerSpec(key=TensorSpec(bits=4, group_size=128, boost=2), value=TensorSpec(bits=4, group_size=128)),
    LayerSpec(key=TensorSpec(group_size=16, boost=15)),
    LayerSpec(key=TensorSpec(bits=4, group_size=32, scales="8bit", boost=9)),
]


def name(layer: LayerSpec) -> str:
    return "-".join(f"{t.bits}g{t.group_size}{t.scales}+{t.boost}" for t in (layer.key, layer.value))


def quantize(native: NativeKernels, k: Tensor, v: Tensor, page: PageFormat, sink_tokens: int = 0) -> Tensor:
    heads, tokens, _ = k.shape
    out = torch.empty(heads, tokens // page.tokens, page.num_bytes, dtype=torch.uint8)
    native.quantize_block(k, v, page, sink_tokens=sink_tokens, out=out)
    return out


def plain(head_dim: int) -> PageFormat:
    return PageFormat(head_dim, LayerSpec())


def random_kv(heads: int, tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    channels = torch.rand(head_dim).mul(3).exp()
    return (torch.randn(heads, tokens, head_dim) * channels).half(), torch.randn(heads, tokens, head_dim).half()


@pytest.mark.parametrize("layer", LAYERS, ids=name)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_format(native: NativeKernels, layer: LayerSpec, head_dim: int) -> None:
    page = PageFormat(head_dim, layer)
    for heads, tokens, sink_tokens in ((1, page.tokens, 0), (3, 384, 4), (2, 128, 15), (2, 128, 16)):
        k, v = random_kv(heads, tokens, head_dim)
        assert torch.equal(
            quantize(native, k, v, page, sink_tokens), quantize_pages(k, v, page, sink_tokens=sink_tokens)
        )


@pytest.mark.parametrize("layer", LAYERS, ids=name)
@pytest.mark.parametrize("strength", [6e-8, 1e-6, 1e-3, 30.0, 3000.0, 60000.0])
@pytest.mark.parametrize("offset", [0.0, 1.0, -100.0])
def test_any_magnitude(native: NativeKernels, layer: LayerSpec, strength: float, offset: float) -> None:
    """Subnormals and numbers at the edge of fp16, alone and far from zero, with a quiet channel and a constant one."""
    page = PageFormat(64, layer)
    x = torch.randn(2, 2, 128, 64) * strength + offset * strength
    x[..., 5] *= 1e-4
    x[..., 6] = offset
    k, v = x.clamp(-65504, 65504).half()
    assert torch.equal(quantize(native, k, v, page, 3), quantize_pages(k, v, page, sink_tokens=3))


@pytest.mark.parametrize("layer", LAYERS, ids=name)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -300.5, 65504.0, 6e-8])
def test_constant_groups(native: NativeKernels, layer: LayerSpec, value: float) -> None:
    page = PageFormat(64, layer)
    x = torch.full((2, 128, 64), value).half()
    assert torch.equal(quantize(native, x, x, page), quantize_pages(x, x, page))


@pytest.mark.parametrize("layer", LAYERS, ids=name)
def test_few_values(native: NativeKernels, layer: LayerSpec) -> None:
    """Ties: values half way between codes, and two values alternating."""
    page = PageFormat(32, layer)
    k = torch.randint(-8, 9, (4, 128, 32)).half() * 0.25
    v = torch.tensor([65504.0, -65504.0]).half()[torch.randint(0, 2, (4, 128, 32))]
    assert torch.equal(quantize(native, k, v, page), quantize_pages(k, v, page))
    assert torch.equal(quantize(native, v, k, page), quantize_pages(v, k, page))


def test_many_groups(native: NativeKernels) -> None:
    """The plain format, two million values."""
    page = plain(128)
    k, v = random_kv(8, 1024, 128)
    assert torch.equal(quantize(native, k, v, page, 1), quantize_pages(k, v, page, sink_tokens=1))


@pytest.mark.parametrize("key_group", [16, 32, 64])
def test_sinks_do_not_count(native: NativeKernels, key_group: int) -> None:
    page = PageFormat(64, LayerSpec(key=TensorSpec(group_size=key_group)))
    k, v = random_kv(2, 64, 64)
    before = quantize(native, k, v, page, 7)
    keys, values = page.split(before)
    assert isinstance(keys, Packed) and isinstance(values, Packed)
    for x in (keys.codes, values.codes, values.scale, values.zero):
        assert not x[:, 0, :7].any()
    k[:, :7], v[:, :7] = 1000.0, -1000.0
    assert torch.equal(quantize(native, k, v, page, 7), before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("token", [0, 127])
@pytest.mark.parametrize("bits", [2, 16])
def test_not_finite_is_refused(native: NativeKernels, bad: float, where: str, token: int, bits: int) -> None:
    """A sink (token 0) counts too: it goes to the store as well."""
    k, v = random_kv(2, 128, 64)
    (k if where == "keys" else v)[1, token, 63] = bad
    page = PageFormat(64, LayerSpec(key=TensorSpec(bits=bits), value=TensorSpec(bits=bits)))
    with pytest.raises(ValueError, match="not finite"):
        quantize(native, k, v, page, sink_tokens=4)


def test_strides(native: NativeKernels) -> None:
    """K and V as a view of a tail, and as a transposed [T, H, D]."""
    k, v = random_kv(3, 128, 64)
    expected = quantize(native, k, v, plain(64))
    wide = torch.empty(2, 5, 200, 64, dtype=torch.float16)
    wide[0, 1:4, 7:135], wide[1, 1:4, 7:135] = k, v
    assert torch.equal(quantize(native, wide[0, 1:4, 7:135], wide[1, 1:4, 7:135], plain(64)), expected)
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    assert torch.equal(quantize(native, k, v, plain(64)), expected)


@pytest.mark.usefixtures("two_threads")
def test_same_bytes_for_any_threads(native: NativeKernels) -> None:
    k, v = random_kv(4, 256, 128)
    page = plain(128)
    two = quantize(native, k, v, page, 4)
    torch.set_num_threads(1)
    assert torch.equal(quantize(native, k, v, page, 4), two)
    for head in range(4):
        assert torch.equal(quantize(native, k[head, None], v[head, None], page, 4)[0], two[head])


@pytest.mark.parametrize("key_group", [16, 64])
def test_pages_are_independent(native: NativeKernels, key_group: int) -> None:
    """Blocks of other sizes hold the same pages."""
    page = PageFormat(96, LayerSpec(key=TensorSpec(group_size=key_group)))
    k, v = random_kv(2, 128, 96)
    whole = quantize(native, k, v, page)
    for index in range(128 // page.tokens):
        part = slice(page.tokens * index, page.tokens * (index + 1))
        assert torch.equal(quantize(native, k[:, part], v[:, part], page)[:, 0], whole[:, index])


def test_wrong_arguments_are_refused(native: NativeKernels) -> None:
    k, v = random_kv(2, 64, 64)
    page = plain(64)
    out = torch.empty(2, 2, page.num_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="keys must be"):
        native.quantize_block(k.float(), v, page, sink_tokens=0, out=out)
    with pytest.raises(ValueError, match="values must be"):
        native.quantize_block(k, v[:1], page, sink_tokens=0, out=out)
    with pytest.raises(ValueError, match="out must be"):
        native.quantize_block(k, v, page, sink_tokens=0, out=out[:1])
    with pytest.raises(ValueError, match="contiguous"):
        native.quantize_block(k.mT.contiguous().mT, v, page, sink_tokens=0, out=out)
    with pytest.raises(ValueError, match="cannot pack 50 tokens"):
        native.quantize_block(k[:, :50], v[:, :50], page, sink_tokens=0, out=out)
    with pytest.raises(ValueError, match="with 17 sinks"):
        native.quantize_block(k, v, page, sink_tokens=17, out=out)
    with pytest.raises(ValueError, match="do not fit pages of 96"):
        native.quantize_block(k, v, plain(96), sink_tokens=0, out=out)
    with pytest.raises(ValueError, match="head_dim is not supported"):
        quantize(native, *random_kv(1, 32, 160), plain(160))
