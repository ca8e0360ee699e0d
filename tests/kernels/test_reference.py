"""The specification itself: fit, masking, and attention on packed blocks against attention on what they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvferry.kernels.page import PageFormat
from kvferry.kernels.reference import (
    ReferenceKernels,
    ScoreRule,
    attend,
    dequantize_pages,
    fit_groups,
    merge,
    quantize_pages,
    widest_channels,
)
from kvferry.kernels.scales import unfold
from kvferry.kernels.spec import LayerSpec, TensorSpec

kernels = ReferenceKernels()
Everything = torch.tensor(True)
TWO_BITS = TensorSpec()
RULE = ScoreRule(0.2)
TENSORS = [
    TensorSpec(bits=bits, group_size=group, scales=scales)
    for bits, group, scales in itertools.product((2, 4, 8), (16, 32, 64, 128), ("fp16", "8bit"))
    if (bits, scales) != (8, "8bit")
]


def plain(head_dim: int) -> PageFormat:
    return PageFormat(head_dim, LayerSpec())


def restore(x: Tensor, valid: Tensor = Everything, tensor: TensorSpec = TWO_BITS) -> Tensor:
    codes, scale, zero = fit_groups(x, valid, tensor.bits, tensor.scales)
    s, z = unfold(scale, zero, tensor.bits)
    return codes.float() * s[..., None] + z[..., None]


def test_fit_beats_min_max() -> None:
    x = torch.randn(4096, 32)
    lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (hi - lo) / 3
    min_max = ((x - lo) / step).round() * step + lo
    fitted = (restore(x) - x).square().mean()
    assert fitted < 0.095
    assert fitted < 0.65 * (min_max - x).square().mean()


@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        (TensorSpec(scales="8bit"), 0.0965),
        (TensorSpec(group_size=64), 0.111),
        (TensorSpec(group_size=64, scales="8bit"), 0.1115),
        (TensorSpec(group_size=16, scales="8bit"), 0.0735),
        (TensorSpec(bits=4), 0.0056),
        (TensorSpec(bits=4, scales="8bit"), 0.0065),
        (TensorSpec(bits=8), 2.1e-5),
    ],
    ids=str,
)
def test_error_of_formats(tensor: TensorSpec, error: float) -> None:
    """Mean square error on unit normal data; see docs/layout.md."""
    x = torch.randn(4096, tensor.group_size)
    assert (restore(x, tensor=tensor) - x).square().mean() < error


@pytest.mark.parametrize("tensor", TENSORS, ids=str)
@pytest.mark.parametrize("offset", [0.0, 3.0, -40.0, 500.0])
def test_groups_far_from_zero(tensor: TensorSpec, offset: float) -> None:
    """A channel with a large mean and little spread: its error stays near the step that its scale encoding can take."""
    x = torch.randn(512, tensor.group_size) + offset
    error = (restore(x, tensor=tensor) - x).abs().mean()
    steps = 2.0**tensor.bits
    reach = abs(offset) / (4 * steps) if tensor.scales == "8bit" else 0.0  # the least scale whose zero point fits
    assert error <= max(4.0 / steps, reach) + (abs(offset) + 4) * 2**-10


@pytest.mark.parametrize("value", [0.0, 1.0, -3.25, 1000.0, -16384.0, 1e-4, 6e-8])
def test_constant_groups(value: float) -> None:
    """A constant keeps its value, up to the rounding of the zero point."""
    restored = restore(torch.full((3, 32), value))
    assert (restored - value).abs().max() <= abs(value) * 2**-11 + 2**-14


@pytest.mark.parametrize("magnitude", [1e-7, 1e-5, 1e-3, 1.0, 1e3, 16000.0])
def test_magnitudes(magnitude: float) -> None:
    x = (torch.randn(256, 32).clamp(-1, 1) * magnitude).half().float()
    error = (restore(x) - x).square().mean()
    assert error <= max(0.12 * x.square().mean(), torch.tensor(2.0**-30))


def test_values_beyond_the_limit_are_clamped() -> None:
    x = torch.tensor([-65504.0, 65504.0]).repeat(16)[None]
    codes, scale, zero = fit_groups(x, Everything, 2, "fp16")
    assert scale.isfinite().all() and zero.isfinite().all()
    s, z = unfold(scale, zero, 2)
    assert torch.allclose(codes.float() * s + z, x.clamp(-16384, 16384), rtol=2e-3)


def test_group_with_one_outlier() -> None:
    x = torch.zeros(1, 32)
    x[0, 5] = 100.0
    restored = restore(x)
    assert restored[0, 5] == pytest.approx(100.0, rel=0.1)


def test_masked_values_do_not_count() -> None:
    x = torch.randn(16, 32)
    wild = x.clone()
    wild[:, :4] = 1e4
    valid = torch.arange(32) >= 4
    for a, b in zip(fit_groups(x, valid, 2, "fp16"), fit_groups(wild, valid, 2, "fp16"), strict=True):
        assert torch.equal(a, b)
    codes, scale, zero = fit_groups(wild, torch.zeros(32, dtype=torch.bool), 2, "fp16")
    assert not codes.any() and not scale.any() and not zero.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_not_finite_is_refused(bad: float, where: str) -> None:
    k, v = torch.randn(2, 2, 64, 32).half()
    (k if where == "keys" else v)[1, 40, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize_pages(k, v, plain(32))


@pytest.mark.parametrize("tensor", [*TENSORS, TensorSpec(bits=16)], ids=str)
def test_sinks_are_left_out(tensor: TensorSpec) -> None:
    page = PageFormat(64, LayerSpec(key=tensor, value=tensor))
    k, v = torch.randn(2, 2, 256, 64).half()
    pages = quantize_pages(k, v, page, sink_tokens=4)
    keys, values = page.split(pages)
    if isinstance(keys, Tensor) or isinstance(values, Tensor):
        assert isinstance(keys, Tensor) and isinstance(values, Tensor)
        assert not keys[:, 0, :4].any() and not values[:, 0, :4].any()
    else:
        assert not keys.codes[:, 0, :4].any() and not values.codes[:, 0, :4].any()
        assert not values.scale[:, 0, :4].any() and not values.zero[:, 0, :4].any()
    k[:, :4] = v[:, :4] = 100.0  # what the sinks hold does not matter
    assert torch.equal(quantize_pages(k, v, page, sink_tokens=4), pages)
    assert torch.equal(pages[:, 1:], quantize_pages(k, v, page)[:, 1:])


@pytest.mark.parametrize("tensor", [*TENSORS, TensorSpec(bits=16)], ids=str)
@pytest.mark.parametrize("head_dim", [80, 96])
def test_quantization_error_of_pages(tensor: TensorSpec, head_dim: int) -> None:
    """Also where the last value group of a token is short, and where keys and values differ."""
    k, v = torch.randn(2, 3, 128, head_dim).half()
    for spec in (LayerSpec(key=tensor), LayerSpec(value=tensor)):
        page = PageFormat(head_dim, spec)
        pages = quantize_pages(k, v, page)
        assert pages.shape == (3, 128 // page.tokens, page.num_bytes)
        keys, values = dequantize_pages(pages, page)
        for x, y, bits in ((k, keys, spec.key.bits), (v, values, spec.value.bits)):
            assert (x.float() - y).square().mean() < {2: 0.12, 4: 0.012, 8: 0.002, 16: 1e-9}[bits]


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("scales", ["fp16", "8bit"])
def test_boosted_channels_are_the_widest(head_dim: int, scales: str) -> None:
    """They are stored as 4-bit keys would be, the others as 2-bit ones."""
    tensor = TensorSpec(group_size=64, scales=scales, boost=4)
    page = PageFormat(head_dim, LayerSpec(key=tensor))
    wide = torch.randperm(head_dim)[: page.boosted].sort().values
    strength = torch.ones(head_dim).scatter(0, wide, 8.0)
    k, v = (torch.randn(3, 128, head_dim) * strength).half(), torch.randn(3, 128, head_dim).half()
    keys, _ = dequantize_pages(quantize_pages(k, v, page, sink_tokens=4), page)
    for bits, channels in ((4, strength > 1), (2, strength == 1)):
        alike = PageFormat(head_dim, LayerSpec(key=replace(tensor, bits=bits, boost=0)))
        expected, _ = dequantize_pages(quantize_pages(k, v, alike, sink_tokens=4), alike)
        assert torch.equal(keys[..., channels], expected[..., channels])


def test_boosted_channels_of_4_bits_have_6() -> None:
    boosted = PageFormat(64, LayerSpec(key=TensorSpec(bits=4, boost=2)))
    k = torch.randn(3, 128, 64).half()
    k[..., :8] *= 4.0
    keys, _ = dequantize_pages(quantize_pages(k, k, boosted), boosted)
    errors = (keys - k.float()).square().mean((0, 1)) / k.float().square().mean((0, 1))
    assert errors[:8].max() < 6e-4 < 4e-3 < errors[8:].min()


def test_widest_channels_of_equal_ones_are_the_first() -> None:
    valid = torch.ones(1, 64, dtype=torch.bool)
    assert widest_channels(torch.zeros(1, 64, 32), valid, 8).tolist() == [list(range(8))]
    assert widest_channels(torch.zeros(1, 64, 32), ~valid, 8).tolist() == [list(range(8))]


def test_merge_of_parts_is_the_whole() -> None:
    q, k, v = torch.randn(2, 3, 5, 32), torch.randn(2, 40, 32), torch.randn(2, 40, 32)
    every = torch.ones(40, dtype=torch.bool)
    whole, _ = attend(q, k, v, every, RULE)
    cuts = (0, 1, 17, 40)
    parts = [attend(q, k[:, a:b], v[:, a:b], every[a:b], RULE) for a, b in itertools.pairwise(cuts)]
    assert torch.allclose(merge(parts), whole, atol=1e-6)


def test_merge_ignores_an_empty_part() -> None:
    q, k, v = torch.randn(1, 1, 2, 32), torch.randn(1, 8, 32), torch.randn(1, 8, 32)
    some = attend(q, k, v, torch.ones(8, dtype=torch.bool), RULE)
    none = attend(q, k, v, torch.zeros(8, dtype=torch.bool), RULE)
    assert torch.allclose(merge([none, some]), some[0])


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("table", [[], [7], [5, 2, 8]], ids=len)
def test_decode_is_attention_on_the_dequantized_context(
    group: int, table: list[int], make_cache: Callable[..., object]
) -> None:
    cache = make_cache(head_dim=32)
    batch = cache.batch([table], [37])
    query = cache.query(group, 1)
    keys, values = [], []
    if table:
        pages = cache.layout.layer_pages(cache.pool[table], 1).transpose(0, 1).flatten(1, 2)
        k, v = dequantize_pages(pages, plain(32))
        sinks = cache.sinks[0, 1].float()
        keys += [sinks[:, 0], k[:, 4:]]
        values += [sinks[:, 1], v[:, 4:]]
    tail = cache.tails[0, 1, :, :, :37].float()
    k, v = torch.cat([*keys, tail[0]], dim=1), torch.cat([*values, tail[1]], dim=1)
    expected = torch.nn.functional.scaled_dot_product_attention(query.view(2, group, 32), k, v, scale=cache.scale)
    actual = kernels.decode_attention(query, batch, layer=1, scale=cache.scale)
    assert torch.allclose(actual.view_as(expected), expected, atol=1e-5)


def test_chunk_agrees_with_decode(make_cache: Callable[..., object]) -> None:
    """Row i of a chunk sees what a decode step with i + 1 tokens in its tail sees."""
    cache = make_cache()
    n, group = 9, 3
    query = cache.query(group, n).transpose(0, 1)  # [Hq, n, D]
    keys, values = cache.tails[2, 0, 0, :, :n], cache.tails[2, 0, 1, :, :n]
    for table in ([], [4, 1]):
        rows = kernels.chunk_attention(query, keys, values, cache.prefix(table, slot=2), layer=0, scale=cache.scale)
        for i in (0, 4, 8):
            batch = cache.batch([table], [i + 1], slots=[2])
            step = kernels.decode_attention(query[:, i][None], batch, layer=0, scale=cache.scale)
            assert torch.allclose(rows[:, i], step[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_has_the_query_dtype(dtype: torch.dtype, make_cache: Callable[..., object]) -> None:
    cache = make_cache()
    query = cache.query(2, 1).to(dtype)
    out = kernels.decode_attention(query, cache.batch([[3]], [1]), layer=0, scale=cache.scale)
    assert out.dtype == dtype and out.shape == query.shape
