"""The bytes of a page and of a payload."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.spec import KVQuantSpec, LayerSpec, TensorSpec

MIXED = (
    (1, LayerSpec(key=TensorSpec(bits=4, group_size=64, scales="8bit"), value=TensorSpec(bits=16))),
    (2, LayerSpec(value=TensorSpec(group_size=64, scales="8bit"))),
)
"""Layers that differ in everything, beside a plain layer 0."""


def layout(**options: Any) -> BlockLayout:
    return BlockLayout(num_layers=3, num_kv_heads=2, head_dim=64, spec=KVQuantSpec(**options))


def test_sizes() -> None:
    small = layout(block_size=96)
    assert small.block_bytes == 3 * 2 * 3 * 24 * 64
    assert small.payload_bytes(1) == small.block_bytes
    assert small.payload_bytes(0) == small.block_bytes + 3 * 2 * 2 * 4 * 64 * 2


def test_layers_lie_one_after_the_other() -> None:
    shape = layout(overrides=MIXED)
    d, heads = 64, 2
    sizes = [
        heads * 4 * 24 * d,
        heads * 2 * (2048 + 2 * d + 64 * d * 2),
        heads * 4 * (768 + 512 + 2 * 32),
    ]
    assert [layer.offset for layer in shape.layers] == [0, sizes[0], sizes[0] + sizes[1]]
    assert shape.block_bytes == sum(sizes)
    pool = torch.arange(2 * shape.block_bytes).view(2, -1)
    view = shape.layer_pages(pool, 1)
    assert view.shape == (2, heads, 2, shape.layers[1].page.num_bytes)
    assert view[1].flatten().tolist() == list(
        range(shape.block_bytes + sizes[0], shape.block_bytes + sizes[0] + sizes[1])
    )
    assert shape.effective_bits(128 * 1000) == pytest.approx(
        8 * sum(sizes) / (3 * heads * 128 * d * 2) + 4 * 16 / 128_000
    )


def test_a_spec_for_a_larger_model_is_refused() -> None:
    with pytest.raises(ValueError, match="names layers"):
        layout(overrides=((3, LayerSpec()),))


@pytest.mark.parametrize("overrides", [(), MIXED], ids=["alike", "mixed"])
@pytest.mark.parametrize("sink_tokens", [0, 4, 16])
def test_payload_round_trip(sink_tokens: int, overrides: Any) -> None:
    shape = layout(sink_tokens=sink_tokens, overrides=overrides)
    block = torch.randint(0, 256, (shape.block_bytes,), dtype=torch.uint8) & 0xBF  # no fp16 in it is Inf or NaN
    sinks = torch.randn(shape.sink_shape).half()
    first = shape.join_payload(block, sinks)
    assert first.shape == (shape.payload_bytes(0),)
    back, back_sinks = shape.split_payload(first, 0)
    assert torch.equal(back, block)
    assert back_sinks is not None and torch.equal(back_sinks, sinks)

    later = shape.join_payload(block, None)
    assert bytes(later.tolist()) == bytes(block.flatten().tolist())
    back, back_sinks = shape.split_payload(later, 7)
    assert torch.equal(back, block) and back_sinks is None


@pytest.mark.parametrize("block_index", [0, 3])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_floats_that_are_not_finite_are_refused(block_index: int, number: float) -> None:
    """Every fp16 of a head in turn; the codes may be any bytes."""
    shape = layout()
    d = shape.head_dim
    block = torch.zeros(shape.block_bytes, dtype=torch.uint8)
    for layer in range(3):
        pages = shape.layer_pages(block, layer)
        pages[..., : 8 * d] = pages[..., 12 * d : 20 * d] = 255
    sinks = torch.zeros(shape.sink_shape).half() if block_index == 0 else None
    payload = shape.join_payload(block, sinks)
    shape.split_payload(payload, block_index)
    bad = torch.tensor([number]).half().view(torch.uint8)
    floats = [*range(8 * d, 12 * d, 2), *range(20 * d, 24 * d, 2)]
    start = shape.sink_bytes // (shape.num_layers * shape.num_kv_heads) if block_index == 0 else 0
    for offset in [*range(0, start, 2), *(start + f for f in floats)]:
        damaged = payload.clone()
        damaged[offset : offset + 2] = bad
        with pytest.raises(ValueError, match="not finite"):
            shape.split_payload(damaged, block_index)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_layer_is_looked_at(layer: int) -> None:
    """Infinity as the last fp16 of layer 0 and 1, and as the first 8-bit scale of layer 2."""
    shape = layout(overrides=MIXED)
    payload = shape.join_payload(torch.zeros(shape.block_bytes, dtype=torch.uint8), None)
    page = shape.layers[layer].page
    share = shape.layer_pages(payload, layer)[1, -1]
    if layer == 2:
        share[page.offsets.v_scale] = 248
    else:
        share[-2:] = torch.tensor([math.inf]).half().view(torch.uint8)
    with pytest.raises(ValueError, match="not finite"):
        shape.split_payload(payload, 1)


@pytest.mark.parametrize("channels", [[64], [3, 3], [5, 4], [0, 255]], ids=str)
@pytest.mark.parametrize("head", [0, 1])
def test_boosted_channels_that_do_not_exist_are_refused(channels: list[int], head: int) -> None:
    """They would be indices outside a head."""
    shape = layout(layer=LayerSpec(key=TensorSpec(boost=4)))
    payload = torch.zeros(shape.block_bytes, dtype=torch.uint8)
    for layer in range(3):
        begin = shape.layers[layer].page.offsets.k_channels
        shape.layer_pages(payload, layer)[..., begin : begin + 16] = torch.arange(0, 64, 4, dtype=torch.uint8)
    shape.split_payload(payload, 1)
    share = shape.layer_pages(payload, 1)[head, -1]
    share[begin + 16 - len(channels) : begin + 16] = torch.tensor(channels, dtype=torch.uint8)
    with pytest.raises(ValueError, match="boosted channels"):
        shape.split_payload(payload, 1)


def test_payload_of_block_0_is_one_slice_a_head() -> None:
    shape = layout()
    block = torch.randint(0, 256, (shape.block_bytes,), dtype=torch.uint8)
    sinks = torch.randn(shape.sink_shape).half()
    slices = shape.join_payload(block, sinks).view(3, 2, -1)
    raw = sinks[1, 0].view(torch.uint8).flatten()
    assert torch.equal(slices[1, 0], torch.cat([raw, shape.layer_pages(block, 1)[0].flatten()]))


@pytest.mark.parametrize("block_index", [0, 1])
def test_payload_of_wrong_size_is_refused(block_index: int) -> None:
    shape = layout()
    with pytest.raises(ValueError, match=f"block {block_index} has"):
        shape.split_payload(torch.zeros(shape.payload_bytes(block_index) - 1, dtype=torch.uint8), block_index)


def test_effective_bits() -> None:
    shape = layout(sink_tokens=0)
    assert shape.effective_bits(100) == 16.0  # all in the tail
    assert shape.effective_bits(128) == 3.0
    assert shape.effective_bits(256) == 3.0
    assert shape.effective_bits(192) == pytest.approx((128 * 3 + 64 * 16) / 192)
    assert layout().effective_bits(128) == pytest.approx(3.0 + 4 * 16 / 128)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorSpec(bits=3), "bits 3 is not one of 2, 4, 8, 16"),
        (lambda: TensorSpec(group_size=48), "group_size 48"),
        (lambda: TensorSpec(scales="fp8"), "scales 'fp8'"),
        (lambda: TensorSpec(bits=8, scales="8bit"), "8 bits need scales"),
        (lambda: KVQuantSpec(block_size=40), "block_size 40 must be a multiple of 32"),
        (lambda: KVQuantSpec(block_size=96, overrides=MIXED), "block_size 96 must be a multiple of 64"),
        (lambda: KVQuantSpec(sink_tokens=17), "sink_tokens 17"),
        (lambda: KVQuantSpec(fit="none"), "fit 'none'"),
        (lambda: KVQuantSpec(overrides=MIXED[::-1]), "must ascend"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_specs_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_every_field_is_in_the_digest() -> None:
    specs = [
        KVQuantSpec(),
        KVQuantSpec(sink_tokens=5),
        KVQuantSpec(block_size=64),
        *(
            KVQuantSpec(**{field: value})
            for tensor in (TensorSpec(bits=4), TensorSpec(group_size=64), TensorSpec(scales="8bit"))
            for layer in (LayerSpec(key=tensor), LayerSpec(value=tensor))
            for field, value in (("layer", layer), ("overrides", ((0, layer),)), ("overrides", ((1, layer),)))
        ),
    ]
    assert len({spec.digest() for spec in specs}) == len(specs)
