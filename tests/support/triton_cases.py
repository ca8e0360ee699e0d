"""The Triton kernels against the reference, one function a case: for the interpreter and for a GPU alike.

As a script, with a shard's number: runs its share of the cases in Triton's interpreter and prints a line of JSON each.
Triton decides when it is imported whether kernels are interpreted, for the whole process.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.packed import DecodeBatch, PackedPrefix
from kvferry.kernels.page import Packed, PageFormat
from kvferry.kernels.presets import PRESETS
from kvferry.kernels.reference import ReferenceKernels, dequantize_pages, quantize_pages
from kvferry.kernels.spec import KVQuantSpec, LayerSpec, TensorSpec
from support.context_shares import cut_batch

SHARDS = 2
"""Processes for the interpreted cases."""
TOLERANCE = 3e-3
"""Of the largest value: weights and dequantized numbers are fp16 in the kernels, fp32 in the reference."""
LAYER = 1
CPU = torch.device("cpu")


def layer_spec(text: str) -> LayerSpec:
    """ "4/64/8bit/6 2/32/fp16": bits, group, scales and boost of K, then of V; "16" alone is fp16, and the name of a
    preset its layers."""
    if text in PRESETS:
        return PRESETS[text].layer
    sides = []
    for side in text.split():
        bits, *rest = side.split("/")
        names: Any = dict(zip(("group_size", "scales", "boost"), rest, strict=False))
        numbers = {name: value if name == "scales" else int(value) for name, value in names.items()}
        sides.append(TensorSpec(bits=int(bits), **numbers))
    return LayerSpec(key=sides[0], value=sides[1])


PLAIN = "2/32/fp16 2/32/fp16"


def triton_kernels() -> Any:
    from kvferry.kernels.triton_kernels import TritonKernels

    return TritonKernels()


# Quantize


def quantize_both(
    keys: Tensor, values: Tensor, page: PageFormat, device: torch.device, *, sink_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    heads, tokens, _ = keys.shape
    out = torch.full((heads, tokens // page.tokens, page.num_bytes), 255, dtype=torch.uint8, device=device)
    triton_kernels().quantize_block(keys.to(device), values.to(device), page, sink_tokens=sink_tokens, out=out)
    return out.cpu(), quantize_pages(keys, values, page, sink_tokens=sink_tokens)


def assert_same_pages(got: Tensor, wanted: Tensor, page: PageFormat) -> None:
    """Equal but for ties: sums are taken in another order, which may move a scale or a zero point by its last bit."""
    for side, tensor, a, b in zip(
        "KV", (page.spec.key, page.spec.value), page.split(got), page.split(wanted), strict=True
    ):
        if not isinstance(a, Packed) or not isinstance(b, Packed):
            assert isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b), side
            continue
        if a.channels is not None and b.channels is not None:
            assert torch.equal(a.channels, b.channels)
            assert page.channels_are_sound(got)
        for name, x, y in zip(("codes", "scale", "zero"), a[:3], b[:3], strict=True):
            differ = (x != y).float().mean().item()
            limit = 1e-3 * 4 ** (tensor.bits // 2 - 1) if name == "codes" else 1e-2
            assert differ <= limit, f"{side} {name}: {differ:.2%} differ"
            if name != "codes" and tensor.scales == "fp16":
                torch.testing.assert_close(x, y, rtol=2e-3, atol=0.0, msg=lambda m, at=f"{side} {name}": f"{at}: {m}")


def check_quantize(
    device: torch.device,
    *,
    head_dim: int,
    form: str = PLAIN,
    tokens: int = 64,
    heads: int = 2,
    sink_tokens: int = 0,
    factor: float = 1.0,
) -> None:
    page = PageFormat(head_dim, layer_spec(form))
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(heads, tokens, head_dim, generator=generator) * factor
    keys[..., 3] *= 8  # an outlier channel
    keys[..., 5] += 9 * factor  # and one far from zero
    keys.clamp_(-65504, 65504)
    values = torch.randn(heads, tokens, head_dim, generator=generator) * factor
    got, wanted = quantize_both(keys.half(), values.half(), page, device, sink_tokens=sink_tokens)
    assert_same_pages(got, wanted, page)
    for a, b in zip(dequantize_pages(got, page), dequantize_pages(wanted, page), strict=True):
        assert (a - b).abs().mean() <= 2e-3 * b.abs().mean()


def check_quantize_constant(device: torch.device, *, head_dim: int) -> None:
    page = PageFormat(head_dim, LayerSpec())
    keys = torch.full((1, 32, head_dim), 1.5).half()
    values = torch.zeros(1, 32, head_dim).half()
    values[:, :, 32:] = -3.0
    got, wanted = quantize_both(keys, values, page, device)
    assert_same_pages(got, wanted, page)
    unpacked_keys, unpacked_values = dequantize_pages(got, page)
    torch.testing.assert_close(unpacked_keys, keys.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(unpacked_values, values.float(), rtol=1e-3, atol=1e-4)


def check_quantize_equal_ranges(device: torch.device) -> None:
    """Of channels of one range the first are boosted; that of sinks does not count."""
    page = PageFormat(64, layer_spec("kv2"))
    keys = torch.arange(128.0).remainder(7).view(1, 128, 1).expand(1, 128, 64).clone()
    keys[:, :, 40:50] *= 2
    keys[:, :4, 30] = 1000.0
    got, wanted = quantize_both(keys.half(), keys.half(), page, device, sink_tokens=4)
    assert_same_pages(got, wanted, page)
    keys, _ = page.split(got)
    assert isinstance(keys, Packed) and keys.channels is not None
    assert keys.channels.flatten().tolist() == [*range(14), *range(40, 50)]


def check_quantize_strided(device: torch.device) -> None:
    page = PageFormat(64, LayerSpec())
    tokens_first = torch.randn(32, 2, 2, 64, generator=torch.Generator().manual_seed(0)).half()
    keys, values = tokens_first.permute(1, 2, 0, 3)
    got, wanted = quantize_both(keys, values, page, device)
    assert_same_pages(got, wanted, page)


def check_quantize_refuses(device: torch.device, *, bad: float, in_keys: bool, form: str = PLAIN) -> None:
    page = PageFormat(64, layer_spec(form))
    keys = torch.ones(2, 128, 64).half()
    values = torch.ones(2, 128, 64).half()
    (keys if in_keys else values)[1, 63, 63] = bad
    out = torch.empty(2, 128 // page.tokens, page.num_bytes, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="not finite"):
        triton_kernels().quantize_block(keys.to(device), values.to(device), page, sink_tokens=0, out=out)


# Decode


def make_layout(head_dim: int, heads: int, *, form: str = PLAIN, block_size: int = 32, sinks: int = 4) -> BlockLayout:
    """Two layers, of which the second, `LAYER`, has the format."""
    spec = KVQuantSpec(block_size=block_size, sink_tokens=sinks, overrides=((LAYER, layer_spec(form)),))
    return BlockLayout(num_layers=2, num_kv_heads=heads, head_dim=head_dim, spec=spec)


def random_pool(layout: BlockLayout, blocks: int, *, key_factor: float = 1.0, value_factor: float = 1.0) -> Tensor:
    """The other layer is poison."""
    generator = torch.Generator().manual_seed(1)
    shape = (blocks, layout.num_kv_heads, layout.block_size, layout.head_dim)
    keys = torch.randn(shape, generator=generator) * key_factor
    values = torch.randn(shape, generator=generator) * value_factor + 0.5 * value_factor
    pool = torch.full((blocks, layout.block_bytes), 255, dtype=torch.uint8)
    page = layout.layers[LAYER].page
    if page.boosted:
        keys[..., 1::3] *= 3  # channels to boost
        keys[..., 4::9] += 6 * key_factor
    layout.layer_pages(pool, LAYER).copy_(quantize_pages(keys.half(), values.half(), page))
    return pool


def make_batch(
    layout: BlockLayout,
    contexts: list[tuple[list[int], int]],
    *,
    key_factor: float = 1.0,
    value_factor: float = 1.0,
) -> DecodeBatch:
    """contexts: (block ids, tail tokens) of each sequence. What no kernel may look at is NaN."""
    generator = torch.Generator().manual_seed(2)
    blocks = 1 + max([block for table, _ in contexts for block in table], default=0)
    pool = random_pool(layout, blocks, key_factor=key_factor, value_factor=value_factor)
    slots = len(contexts) + 1
    sinks = torch.randn(slots, *layout.sink_shape, generator=generator)
    tails = torch.randn(slots, *layout.tail_shape, generator=generator)
    for part, axis in ((sinks, 3), (tails, 2)):
        part.select(axis, 0).mul_(key_factor)
        part.select(axis, 1).mul_(value_factor)
    width = max(len(table) for table, _ in contexts) + 1
    tables = torch.full((len(contexts), width), 1 << 20, dtype=torch.int32)
    order = torch.arange(slots - 1, 0, -1, dtype=torch.int32)
    for row, (table, tail) in enumerate(contexts):
        tables[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
        tails[order[row], ..., tail:, :] = torch.nan
        if not table:
            sinks[order[row]] = torch.nan
    tails[0] = sinks[0] = torch.nan
    return DecodeBatch(
        layout=layout,
        pool=pool,
        sinks=sinks.half(),
        tails=tails.half(),
        block_tables=tables,
        num_blocks=torch.tensor([len(table) for table, _ in contexts], dtype=torch.int32),
        slots=order,
        tail_lens=torch.tensor([tail for _, tail in contexts], dtype=torch.int32),
    )


def on_device(batch: DecodeBatch, device: torch.device) -> DecodeBatch:
    tensors = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)


def make_query(batch: DecodeBatch, group: int) -> Tensor:
    rows = batch.num_blocks.shape[0]
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, batch.layout.num_kv_heads * group, batch.layout.head_dim, generator=generator)


class Rule(NamedTuple):
    window: int | None = None
    softcap: float | None = None


NO_RULE = Rule()


def decode(query: Tensor, batch: DecodeBatch, device: torch.device, rule: Rule = NO_RULE) -> Tensor:
    result = triton_kernels().decode_attention(
        query.to(device), on_device(batch, device), layer=LAYER, scale=query.shape[-1] ** -0.5, **rule._asdict()
    )
    assert result.dtype == query.dtype
    return result.cpu()


def check_decode(
    device: torch.device,
    *,
    head_dim: int,
    group: int,
    form: str = PLAIN,
    heads: int = 1,
    block_size: int = 32,
    sinks: int = 4,
    dtype: torch.dtype = torch.float32,
    contexts: list[tuple[list[int], int]] | None = None,
    key_factor: float = 1.0,
    value_factor: float = 1.0,
    rule: Rule = NO_RULE,
) -> None:
    layout = make_layout(head_dim, heads, form=form, block_size=block_size, sinks=sinks)
    contexts = contexts or [([2, 0, 3], 5), ([1], block_size), ([], 1)]
    batch = make_batch(layout, contexts, key_factor=key_factor, value_factor=value_factor)
    query = (make_query(batch, group) / key_factor).to(dtype)
    wanted = ReferenceKernels().decode_attention(
        query.float(), batch, layer=LAYER, scale=head_dim**-0.5, **rule._asdict()
    )
    got = decode(query, batch, device, rule)
    tolerance = TOLERANCE if dtype != torch.bfloat16 else 1e-2
    limit = tolerance * wanted.abs().max().item()
    torch.testing.assert_close(got.float(), wanted, rtol=0.0, atol=limit)


@contextmanager
def small_pieces() -> Iterator[None]:
    """Pieces of one tile, at most two until they grow."""
    import triton.language as tl

    from kvferry.kernels import triton_pieces

    old = triton_pieces.MIN_PIECE, triton_pieces.MAX_PIECES
    triton_pieces.MIN_PIECE, triton_pieces.MAX_PIECES = tl.constexpr(1), tl.constexpr(2)
    try:
        yield
    finally:
        triton_pieces.MIN_PIECE, triton_pieces.MAX_PIECES = old


def check_pieces_grow(device: torch.device, *, rule: Rule = NO_RULE, **options: Any) -> None:
    """Contexts beyond the most pieces, with fewer pieces than the kernels are built for."""
    with small_pieces():
        contexts = [(list(range(5)), 3), ([5, 6], 1), ([7], 1)]
        check_decode(device, head_dim=64, group=2, contexts=contexts, rule=rule, **options)


def check_window_skips(device: torch.device) -> None:
    """Pages outside of the window are never read: their blocks are not in the pool."""
    layout = make_layout(64, 1)
    batch = make_batch(layout, [([3, 1, 0], 7)])
    query = make_query(batch, 3)
    rule = Rule(window=30)  # 7 tail tokens and 23 of block 0
    wanted = decode(query, batch, device, rule)
    batch.block_tables[0, :2] = 1 << 20
    assert torch.equal(decode(query, batch, device, rule), wanted)


def check_decode_alone(device: torch.device, *, rule: Rule = NO_RULE) -> None:
    """A sequence has the same bits alone, in a narrow block table, as in a batch."""
    layout = make_layout(64, 1)
    batch = make_batch(layout, [([3, 1], 7), (list(range(10)), 2), ([], 4)])
    query = make_query(batch, 3)
    together = decode(query, batch, device, rule)
    for row in range(3):
        one = slice(row, row + 1)
        alone = replace(
            batch,
            block_tables=batch.block_tables[one, : int(batch.num_blocks[row])].contiguous(),
            num_blocks=batch.num_blocks[one],
            slots=batch.slots[one],
            tail_lens=batch.tail_lens[one],
        )
        assert torch.equal(decode(query[one], alone, device, rule), together[one]), f"row {row}"


def check_shares(
    device: torch.device,
    *,
    head_dim: int,
    group: int,
    num_shares: int,
    form: str = PLAIN,
    block_size: int = 32,
    contexts: list[tuple[list[int], int]] | None = None,
    softcap: float | None = None,
) -> None:
    """Shares of contexts, an empty one among them, each and merged, against the reference."""
    layout = make_layout(head_dim, 2, form=form, block_size=block_size)
    batch = make_batch(layout, contexts or [([2, 0, 3], 5), ([1], block_size), ([], 1)])
    query = make_query(batch, group)
    kernels, reference = triton_kernels(), ReferenceKernels()
    options: Any = dict(layer=LAYER, scale=head_dim**-0.5, softcap=softcap)
    got = []
    for share in cut_batch(batch, num_shares):
        got.append(kernels.share_attention(query.to(device), on_device(share, device), **options))
        wanted = reference.share_attention(query, share, **options)
        limit = TOLERANCE * wanted[..., :-1].abs().max().item()
        torch.testing.assert_close(got[-1].cpu(), wanted, rtol=TOLERANCE, atol=limit)
    merged = kernels.merge_shares(torch.stack(got))
    wanted = reference.decode_attention(query, batch, **options)
    torch.testing.assert_close(merged.cpu(), wanted, rtol=0.0, atol=TOLERANCE * wanted.abs().max().item())
    none = torch.zeros_like(got[0])
    none[..., -1] = -torch.inf
    assert torch.equal(kernels.merge_shares(torch.stack([none, *got, none])), merged)
    assert not kernels.merge_shares(none[None]).any()


# Chunk


def run_chunk(
    device: torch.device,
    *,
    head_dim: int,
    group: int,
    n: int,
    table: list[int],
    rows: int,
    form: str = PLAIN,
    rule: Rule = NO_RULE,
) -> tuple[Tensor, Tensor]:
    """Result of the first `rows` tokens of a chunk of n, and the reference's."""
    layout = make_layout(head_dim, 2, form=form, block_size=max(64, layer_spec(form).page_tokens))
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(2 * group, n, head_dim, generator=generator)[:, :rows]
    keys = torch.randn(2, n, head_dim, generator=generator).half()[:, :rows]
    values = torch.randn(2, n, head_dim, generator=generator).half()[:, :rows]
    sinks = torch.randn(layout.sink_shape, generator=generator).half()
    pool = random_pool(layout, 3)
    blocks = torch.tensor(table, dtype=torch.int32)
    options: Any = dict(layer=LAYER, scale=head_dim**-0.5, **rule._asdict())
    prefix = PackedPrefix(layout=layout, pool=pool, table=blocks, sinks=sinks)
    wanted = ReferenceKernels().chunk_attention(query, keys, values, prefix, **options)
    there = replace(prefix, pool=pool.to(device), table=blocks.to(device), sinks=sinks.to(device))
    got = triton_kernels().chunk_attention(query.to(device), keys.to(device), values.to(device), there, **options)
    return got.cpu(), wanted


def check_chunk(device: torch.device, *, n: int, **options: Any) -> None:
    got, wanted = run_chunk(device, n=n, rows=n, **options)
    torch.testing.assert_close(got, wanted, rtol=0.0, atol=TOLERANCE * wanted.abs().max().item())


def check_chunk_prefix(device: torch.device, *, rule: Rule = NO_RULE) -> None:
    """The first tokens of a chunk have the same bits however long the chunk is."""
    long, _ = run_chunk(device, head_dim=64, group=3, n=40, table=[1], rows=40, rule=rule)
    short, _ = run_chunk(device, head_dim=64, group=3, n=40, table=[1], rows=9, rule=rule)
    assert torch.equal(long[:, :9], short)


# Cases

FORMS = {
    "k2g16": "2/16/fp16 2/32/fp16",
    "k2g64": "2/64/fp16 2/32/fp16",
    "v2g16": "2/32/fp16 2/16/fp16",
    "v2g64": "2/32/fp16 2/64/fp16",
    "bytes": "2/32/8bit 2/32/8bit",
    "kv3": "kv3",
    "k2g16bytes-v4g16bytes": "2/16/8bit 4/16/8bit",
    "k8-v8": "8/32/fp16 8/32/fp16",
    "k8g64-v8g16": "8/64/fp16 8/16/fp16",
    "k16-v2": "16 2/32/fp16",
    "k2g64-v16": "2/64/8bit 16",
    "kv16": "kv16",
}
BOOSTED = {
    "kv2-d64": (64, "kv2"),
    "kv2-d128": (128, "kv2"),
    "kv4-d64": (64, "kv4"),
    "kv4-d128": (128, "kv4"),
    "boost15-d80": (80, "2/32/fp16/15 2/128/fp16"),
    "boost9-on-4-bits-d64": (64, "4/32/fp16/9 2/32/fp16"),
    "boost5-in-rows-of-16-d48": (48, "4/16/8bit/5 2/128/8bit"),
    "boost15-in-rows-of-16-d64": (64, "2/16/fp16/15 16"),
    "boost12-d256": (256, "2/128/8bit/12 2/128/8bit"),
    "k2g128-v4g128-d128": (128, "2/128/fp16 4/128/fp16"),
}
"""Head dimension and format: boosted channels of every number of words, and groups of 128."""
HEAD_DIMS = {
    80: "2/32/fp16 2/32/8bit",
    96: "4/16/8bit 2/64/fp16",
    256: "2/64/8bit 4/32/8bit",
    48: "2/32/8bit 4/16/fp16",
}
"""Head dimensions other than 64 and 128, each in a format."""

CASES: dict[str, Callable[[torch.device], None]] = {
    "quantize-d64": partial(check_quantize, head_dim=64),
    "quantize-d128": partial(check_quantize, head_dim=128),
    "quantize-d64-sinks": partial(check_quantize, head_dim=64, sink_tokens=4),
    "quantize-d128-sinks": partial(check_quantize, head_dim=128, sink_tokens=4),
    "quantize-huge-values": partial(check_quantize, head_dim=64, factor=8000.0),
    "quantize-tiny-values": partial(check_quantize, head_dim=64, factor=1e-6),
    **{
        f"quantize-{name}": partial(check_quantize, head_dim=64, form=form, sink_tokens=4)
        for name, form in FORMS.items()
    },
    **{
        f"quantize-d{head_dim}": partial(check_quantize, head_dim=head_dim, form=form, heads=1)
        for head_dim, form in HEAD_DIMS.items()
    },
    **{
        f"quantize-{name}": partial(check_quantize, head_dim=head_dim, form=form, tokens=128, heads=1, sink_tokens=4)
        for name, (head_dim, form) in BOOSTED.items()
    },
    "quantize-kv2-equal-ranges": check_quantize_equal_ranges,
    "quantize-huge-bytes": partial(check_quantize, head_dim=64, form=FORMS["bytes"], factor=8000.0),
    "quantize-16-sinks-of-16": partial(check_quantize, head_dim=64, form=FORMS["k2g16"], sink_tokens=16),
    "quantize-constant-d64": partial(check_quantize_constant, head_dim=64),
    "quantize-constant-d128": partial(check_quantize_constant, head_dim=128),
    "quantize-strided-input": check_quantize_strided,
    "quantize-nan-key-refused": partial(check_quantize_refuses, bad=torch.nan, in_keys=True),
    "quantize-nan-value-refused": partial(check_quantize_refuses, bad=torch.nan, in_keys=False),
    "quantize-nan-fp16-refused": partial(check_quantize_refuses, bad=torch.nan, in_keys=False, form="16 16"),
    "quantize-nan-boosted-key-refused": partial(check_quantize_refuses, bad=torch.nan, in_keys=True, form="kv2"),
    "quantize-infinite-key-refused": partial(check_quantize_refuses, bad=-torch.inf, in_keys=True),
    **{
        f"decode-d{head_dim}-group{group}": partial(check_decode, head_dim=head_dim, group=group)
        for head_dim in (64, 128)
        for group in (1, 3, 4, 8)
    },
    "decode-d64-group16": partial(check_decode, head_dim=64, group=16, contexts=[([0], 3)]),
    "decode-two-heads-two-pages": partial(
        check_decode, head_dim=64, group=3, heads=2, block_size=64, contexts=[([1, 0], 63)]
    ),
    "decode-two-pieces": partial(check_decode, head_dim=64, group=3, contexts=[([4, 2, 9, 1, 0, 5, 8, 3, 7, 6], 9)]),
    "decode-one-token-context": partial(check_decode, head_dim=128, group=4, heads=2, contexts=[([], 1)]),
    "decode-long-tail": partial(check_decode, head_dim=64, group=4, block_size=128, contexts=[([], 127), ([], 65)]),
    "decode-no-sinks": partial(check_decode, head_dim=64, group=3, sinks=0),
    "decode-16-sinks": partial(check_decode, head_dim=64, group=3, sinks=16),
    "decode-bf16-query": partial(check_decode, head_dim=64, group=3, dtype=torch.bfloat16),
    "decode-fp16-query": partial(check_decode, head_dim=64, group=3, dtype=torch.float16),
    "decode-huge-values": partial(check_decode, head_dim=64, group=3, key_factor=100.0, value_factor=4000.0),
    "decode-tiny-values": partial(check_decode, head_dim=64, group=3, key_factor=1e-2, value_factor=1e-3),
    "decode-same-bits-alone": check_decode_alone,
    **{
        f"decode-{name}-d{head_dim}": partial(
            check_decode, head_dim=head_dim, group=2, form=form, heads=2, block_size=64, contexts=[(table, 3)]
        )
        for head_dim, table in ((64, [1, 0]), (128, [1]))
        for name, form in FORMS.items()
    },
    **{
        f"decode-d{head_dim}-group3": partial(
            check_decode, head_dim=head_dim, group=3, form=form, block_size=64, contexts=[([1], 5)]
        )
        for head_dim, form in HEAD_DIMS.items()
    },
    **{
        f"decode-d{head_dim}-plain": partial(check_decode, head_dim=head_dim, group=1, contexts=[([1, 0], 5)])
        for head_dim in HEAD_DIMS
    },
    **{
        f"decode-{name}": partial(
            check_decode, head_dim=head_dim, group=2, form=form, block_size=128, contexts=[([1, 0], 3)]
        )
        for name, (head_dim, form) in BOOSTED.items()
    },
    "decode-kv2-window": partial(
        check_decode, head_dim=64, group=3, form="kv2", block_size=128, contexts=[([1, 0], 3)], rule=Rule(100)
    ),
    "decode-d144-fp16": partial(check_decode, head_dim=144, group=1, form="16 16", contexts=[([0], 5)]),
    "decode-d80-fp16": partial(check_decode, head_dim=80, group=1, form="16 16", contexts=[([0], 5)]),
    **{
        f"decode-window{window}": partial(
            check_decode, head_dim=64, group=3, contexts=[([2, 0, 3], 5), ([1], 32), ([], 9)], rule=Rule(window)
        )
        for window in (1, 4, 5, 6, 37, 69, 98, 100, 101, 1000)
    },
    "decode-window-in-a-long-tail": partial(
        check_decode, head_dim=64, group=2, block_size=128, contexts=[([0], 127), ([], 120)], rule=Rule(50)
    ),
    "decode-window-in-pages-of-64": partial(
        check_decode, head_dim=64, group=2, form=FORMS["k2g64"], block_size=64, contexts=[([1, 0], 3)], rule=Rule(40)
    ),
    "decode-window-16-sinks": partial(check_decode, head_dim=64, group=1, sinks=16, contexts=[([0], 4)], rule=Rule(26)),
    "decode-window-skips-pages": check_window_skips,
    "decode-window-same-bits-alone": partial(check_decode_alone, rule=Rule(window=80)),
    "decode-softcap": partial(check_decode, head_dim=64, group=3, rule=Rule(softcap=2.0), key_factor=1.5),
    "decode-window-softcap": partial(check_decode, head_dim=128, group=4, rule=Rule(50, 30.0)),
    "shares-d64": partial(check_shares, head_dim=64, group=3, num_shares=2),
    "shares-d128-softcap": partial(check_shares, head_dim=128, group=4, num_shares=3, softcap=2.0),
    "shares-d80": partial(check_shares, head_dim=80, group=1, num_shares=2, contexts=[([1, 0], 3)]),
    "shares-kv2": partial(
        check_shares, head_dim=64, group=3, num_shares=2, form="kv2", block_size=128, contexts=[([1, 0, 2], 3)]
    ),
    "shares-kv16": partial(check_shares, head_dim=64, group=2, num_shares=4, form="kv16", contexts=[([1, 0], 3)]),
    **{
        f"chunk-d{head_dim}-group{group}-{n}-tokens-{len(table)}-blocks": partial(
            check_chunk, head_dim=head_dim, group=group, n=n, table=table
        )
        for head_dim, group, n, table in (
            (64, 3, 40, [2, 0]),
            (64, 1, 1, [1]),
            (64, 8, 17, []),
            (128, 4, 33, [2, 0]),
            (128, 1, 64, []),
            (128, 3, 5, [1]),
        )
    },
    **{
        f"chunk-{name}-d{head_dim}": partial(check_chunk, head_dim=head_dim, group=2, n=5, table=[1], form=form)
        for head_dim in (64, 128)
        for name, form in FORMS.items()
    },
    **{
        f"chunk-d{head_dim}": partial(check_chunk, head_dim=head_dim, group=1, n=33, table=[1], form=form)
        for head_dim, form in HEAD_DIMS.items()
    },
    **{
        f"chunk-{name}": partial(check_chunk, head_dim=head_dim, group=2, n=5, table=[1, 0], form=form)
        for name, (head_dim, form) in BOOSTED.items()
    },
    "chunk-kv2-window": partial(check_chunk, head_dim=64, group=3, n=50, table=[1, 0], form="kv2", rule=Rule(150)),
    "chunk-d80-fp16": partial(check_chunk, head_dim=80, group=1, n=5, table=[1], form="16 16"),
    **{
        f"chunk-window{window}": partial(check_chunk, head_dim=64, group=3, n=50, table=[2, 0], rule=Rule(window))
        for window in (1, 30, 70, 126, 160, 1000)
    },
    "chunk-softcap": partial(check_chunk, head_dim=64, group=3, n=9, table=[1], rule=Rule(softcap=1.0)),
    "chunk-window-softcap": partial(check_chunk, head_dim=64, group=3, n=40, table=[1], rule=Rule(40, 5.0)),
    "chunk-same-bits-in-a-longer-chunk": check_chunk_prefix,
    "chunk-window-same-bits-in-a-longer-chunk": partial(check_chunk_prefix, rule=Rule(window=30)),
}
INTERPRETED_CASES = CASES | {
    "decode-pieces-grow": check_pieces_grow,
    "decode-window-pieces-grow": partial(check_pieces_grow, rule=Rule(window=70)),
    "decode-kv2-pieces-within-pages": partial(check_pieces_grow, form="kv2", block_size=128),
}


def run_shard(shard: int) -> None:
    """Runs every SHARDS-th case and prints [case, error or null]."""
    torch.set_num_threads(1)
    for name, check in list(INTERPRETED_CASES.items())[shard::SHARDS]:
        error = None
        try:
            check(CPU)
        except (Exception, pytest.fail.Exception):
            error = traceback.format_exc()
        print(json.dumps([name, error]), flush=True)


if __name__ == "__main__":
    run_shard(int(sys.argv[1]))
