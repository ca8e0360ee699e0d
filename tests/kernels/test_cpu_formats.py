"""C attention on pages of every format, in windows and under a soft cap, against the reference."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvferry.kernels.cpu import NativeKernels, load
from kvferry.kernels.reference import ReferenceKernels
from kvferry.kernels.spec import LayerSpec, TensorSpec

DECODE_RATIO = 1e-3
CHUNK_RATIO = 5e-5
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
TENSORS = [
    TensorSpec(bits=bits, group_size=group, scales=scales)
    for bits, group, scales in itertools.product((2, 4, 8), (16, 32, 64), ("fp16", "8bit"))
    if (bits, scales) != (8, "8bit")
] + [TensorSpec(bits=16)]
BOOSTED = [
    LayerSpec(key=TensorSpec(group_size=128, scales="8bit", boost=6), value=TensorSpec(group_size=64, scales="8bit")),
    LayerSpec(key=TensorSpec(bits=4, group_size=128, boost=2), value=TensorSpec(bits=4, group_size=128)),
    LayerSpec(key=TensorSpec(group_size=16, boost=15), value=TensorSpec(bits=8, group_size=128)),
    LayerSpec(key=TensorSpec(bits=4, group_size=32, scales="8bit", boost=9), value=TensorSpec(bits=16)),
]
LAYERS = BOOSTED + [
    LayerSpec(key=key, value=TENSORS[(i + shift) % len(TENSORS)]) for shift in (0, 5) for i, key in enumerate(TENSORS)
]
"""Every tensor format with itself and with another."""
BYTE_SCALES = TensorSpec(group_size=64, scales="8bit")
MIXED = [
    LayerSpec(),
    BOOSTED[0],
    LayerSpec(key=BYTE_SCALES, value=BYTE_SCALES),
    LayerSpec(key=TensorSpec(bits=4, group_size=16), value=TensorSpec(bits=16)),
    LayerSpec(key=TensorSpec(bits=16), value=TensorSpec(bits=4, group_size=16, scales="8bit")),
]
WINDOWS = (1, 2, 5, 31, 40, 41, 64, 100, 167, 168, 169, 200, 270, 290, 293, 294, 295, 10_000)
"""Of a query at position 296: one token, the tail, blocks, pages, the first page, the sinks one by one, all."""
reference = ReferenceKernels()
Check = Callable[[str, Tensor, Tensor, float], None]
MakeCache = Callable[..., Any]


def name(layer: LayerSpec) -> str:
    return "-".join(f"{t.bits}g{t.group_size}{t.scales}+{t.boost}" for t in (layer.key, layer.value))


def guarded_bytes(size: int) -> Tensor:
    """uint8 [size] that end where no memory is mapped."""
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = torch.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), dtype=torch.uint8)
    behind = ctypes.c_void_p(whole.data_ptr() + size)
    assert ctypes.CDLL(None).mprotect(behind, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return whole[:size]


def own_kv(cache: Any, tokens: int) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, cache.layout.num_kv_heads, tokens, cache.layout.head_dim).half()
    return k, v


@pytest.mark.parametrize("layer", LAYERS, ids=name)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode(
    native: NativeKernels, make_cache: MakeCache, assert_close: Check, layer: LayerSpec, head_dim: int
) -> None:
    """The format as a model's second layer, which begins where the first one's pages end."""
    cache = make_cache(head_dim=head_dim, unused=(4,), overrides=((1, layer),))
    batch = cache.batch([[7, 0, 3, 8, 1], [2], []], [1, 128, 37], slots=[2, 0, 3])
    for group in (1, 5):
        query = 0.8 * cache.query(group, 3)  # the largest scores lose the most: they reach 30 here
        expected = reference.decode_attention(query, batch, layer=1, scale=cache.scale)
        actual = native.decode_attention(query, batch, layer=1, scale=cache.scale)
        for row in range(3):
            assert_close(f"group {group} row {row}", expected[row], actual[row], DECODE_RATIO)


@pytest.mark.parametrize("layer", LAYERS, ids=name)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_chunk(
    native: NativeKernels, make_cache: MakeCache, assert_close: Check, layer: LayerSpec, head_dim: int
) -> None:
    cache = make_cache(head_dim=head_dim, overrides=((1, layer),))
    query, (k, v) = cache.query(3, 37).transpose(0, 1), own_kv(cache, 37)
    prefix = cache.prefix([5, 0, 3], slot=1)
    expected = reference.chunk_attention(query, k, v, prefix, layer=1, scale=cache.scale)
    actual = native.chunk_attention(query, k, v, prefix, layer=1, scale=cache.scale)
    assert_close("out", expected, actual, CHUNK_RATIO)


@pytest.mark.parametrize("layer", MIXED, ids=name)
def test_one_term(native: NativeKernels, make_cache: MakeCache, assert_close: Check, layer: LayerSpec) -> None:
    cache = make_cache(layer=layer, head_dim=80)
    batch, query = cache.batch([[7, 0, 3]], [30]), torch.randn(1, 6, 80) * 0.3
    expected = reference.decode_attention(query, batch, layer=0, scale=cache.scale)
    actual = load(terms=1).decode_attention(query, batch, layer=0, scale=cache.scale)
    assert_close("out", expected, actual, 0.1)


@pytest.mark.parametrize("layer", MIXED, ids=name)
@pytest.mark.parametrize("sink_tokens", [0, 4, 16])
def test_decode_window(
    native: NativeKernels, make_cache: MakeCache, assert_close: Check, layer: LayerSpec, sink_tokens: int
) -> None:
    """Blocks outside the window are not read: their ids and bytes may be anything."""
    cache = make_cache(layer=layer, sink_tokens=sink_tokens)
    query = cache.query(3, 1)
    for window in WINDOWS:
        batch = cache.batch([[7, 2]], [41], slots=[2])
        rule: dict[str, Any] = {"layer": 1, "scale": cache.scale, "window": window}
        expected = reference.decode_attention(query, batch, **rule)
        batch.block_tables[0, : max(0, 297 - window) // 128] = -1
        assert_close(f"window {window}", expected, native.decode_attention(query, batch, **rule), DECODE_RATIO)
    everything = native.decode_attention(query, batch, layer=1, scale=cache.scale)
    assert torch.equal(native.decode_attention(query, batch, **rule), everything)


def test_decode_window_of_one_token_is_its_value(
    native: NativeKernels, make_cache: MakeCache, assert_close: Check
) -> None:
    cache = make_cache()
    batch = cache.batch([[7, 2]], [41])
    out = native.decode_attention(cache.query(3, 1), batch, layer=0, scale=cache.scale, window=1)
    assert_close("out", cache.tails[0, 0, 1, :, 40].float().repeat_interleave(3, dim=0)[None], out, 1e-6)


def test_decode_window_does_not_read_pages_before_it(native: NativeKernels, make_cache: MakeCache) -> None:
    cache = make_cache()
    batch, query = cache.batch([[7, 2]], [41], slots=[2]), cache.query(3, 1)
    expected = native.decode_attention(query, batch, layer=1, scale=cache.scale, window=100)
    pages = cache.layout.layer_pages(cache.pool, 1)
    pages[7], pages[2, :, :2] = 255, 255  # position 297 - 100 lies in the third page of block 1
    assert torch.equal(native.decode_attention(query, batch, layer=1, scale=cache.scale, window=100), expected)


@pytest.mark.parametrize("layer", MIXED, ids=name)
@pytest.mark.parametrize("tokens", [1, 40, 130])
@pytest.mark.parametrize("sink_tokens", [0, 4, 16])
def test_chunk_window(
    native: NativeKernels, make_cache: MakeCache, assert_close: Check, layer: LayerSpec, tokens: int, sink_tokens: int
) -> None:
    cache = make_cache(layer=layer, sink_tokens=sink_tokens)
    query, (k, v) = cache.query(3, tokens).transpose(0, 1), own_kv(cache, tokens)
    for window, table in itertools.product(WINDOWS, ([], [5, 0])):
        prefix = cache.prefix(table, slot=1)
        rule: dict[str, Any] = {"layer": 1, "scale": cache.scale, "window": window}
        expected = reference.chunk_attention(query, k, v, prefix, **rule)
        prefix.table[: max(0, 128 * len(table) + 1 - window) // 128] = -1
        actual = native.chunk_attention(query, k, v, prefix, **rule)
        assert_close(f"window {window}, {len(table)} blocks", expected, actual, CHUNK_RATIO)


@pytest.mark.parametrize("layer", MIXED, ids=name)
@pytest.mark.parametrize("softcap", [2.0, 50.0])
@pytest.mark.parametrize("strength", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("window", [None, 150])
def test_softcap(
    native: NativeKernels,
    make_cache: MakeCache,
    assert_close: Check,
    layer: LayerSpec,
    softcap: float,
    strength: float,
    window: int | None,
) -> None:
    """Also of scores far above the cap, and with both a cap and a window (Gemma 2)."""
    cache = make_cache(layer=layer)
    query, (k, v) = cache.query(3, 40) * strength, own_kv(cache, 40)
    rule: dict[str, Any] = {"layer": 1, "scale": cache.scale, "window": window, "softcap": softcap}
    prefix, rows = cache.prefix([5, 0], slot=1), query.transpose(0, 1)
    expected = reference.chunk_attention(rows, k, v, prefix, **rule)
    # A capped score is known as well as the score: at strength 100 those reach 2000.
    assert_close("chunk", expected, native.chunk_attention(rows, k, v, prefix, **rule), CHUNK_RATIO * max(1, strength))
    batch = cache.batch([[7, 2], []], [41, 9], slots=[2, 0])
    expected = reference.decode_attention(query[:2], batch, **rule)
    actual = native.decode_attention(query[:2], batch, **rule)
    assert_close("decode", expected, actual, DECODE_RATIO * max(1, strength / 2))


@pytest.mark.parametrize("layer", MIXED, ids=name)
@pytest.mark.parametrize("rule", [{}, {"window": 300}, {"softcap": 20.0, "window": 150}], ids=str)
@pytest.mark.usefixtures("two_threads")
def test_a_decode_row_has_the_same_bits_in_any_company(
    native: NativeKernels, make_cache: MakeCache, layer: LayerSpec, rule: dict[str, Any]
) -> None:
    cache = make_cache(layer=layer, kv_heads=3, blocks=12)
    tables, tails, query = [[0, 1, 2, 3, 4, 5, 6], [7], [], [8, 9]], [77, 1, 128, 30], cache.query(5, 4)
    arguments: dict[str, Any] = {"layer": 1, "scale": cache.scale, **rule}
    together = native.decode_attention(query, cache.batch(tables, tails), **arguments)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for i in range(4):
            batch = cache.batch([tables[i]], [tails[i]], slots=[i])
            assert torch.equal(native.decode_attention(query[i, None], batch, **arguments)[0], together[i])


@pytest.mark.parametrize("layer", MIXED, ids=name)
@pytest.mark.parametrize("rule", [{}, {"window": 70}, {"softcap": 20.0, "window": 150}], ids=str)
@pytest.mark.usefixtures("two_threads")
def test_a_chunk_row_has_the_same_bits_in_any_company(
    native: NativeKernels, make_cache: MakeCache, layer: LayerSpec, rule: dict[str, Any]
) -> None:
    cache = make_cache(layer=layer, kv_heads=3)
    query, (k, v) = cache.query(3, 128).transpose(0, 1).contiguous(), own_kv(cache, 128)
    prefix = cache.prefix([6, 1, 3])

    def run(tokens: int) -> Tensor:
        return native.chunk_attention(
            query[:, :tokens], k[:, :tokens], v[:, :tokens], prefix, layer=1, scale=cache.scale, **rule
        )

    whole = run(128)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for tokens in (1, 5, 32, 50, 127, 128):
            assert torch.equal(run(tokens), whole[:, :tokens])


@pytest.mark.parametrize("layer", MIXED, ids=name)
@pytest.mark.parametrize("window", [None, 200])
def test_chunk_agrees_with_decode(
    native: NativeKernels, make_cache: MakeCache, assert_close: Check, layer: LayerSpec, window: int | None
) -> None:
    """The first decoded token after a prefill continues it."""
    cache = make_cache(layer=layer)
    query = cache.query(3, 30).transpose(0, 1)
    k, v = cache.tails[2, 0, 0, :, :30], cache.tails[2, 0, 1, :, :30]
    rule: dict[str, Any] = {"layer": 0, "scale": cache.scale, "window": window, "softcap": 30.0}
    rows = native.chunk_attention(query, k, v, cache.prefix([4, 1], slot=2), **rule)
    step = native.decode_attention(query[:, -1][None], cache.batch([[4, 1]], [30], slots=[2]), **rule)
    assert_close("last row", rows[:, -1], step[0], DECODE_RATIO)


@pytest.mark.parametrize("layer", MIXED, ids=name)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_nothing_is_touched_behind_the_pool(
    native: NativeKernels, make_cache: MakeCache, layer: LayerSpec, head_dim: int
) -> None:
    cache = make_cache(layer=layer, head_dim=head_dim, num_layers=1, kv_heads=1, blocks=1, slots=1)
    pool = guarded_bytes(cache.pool.numel())[-cache.pool.numel() :].view(1, -1)
    query, (k, v), (x, y) = cache.query(3, 1), own_kv(cache, 1), own_kv(cache, 128)
    pages = cache.layout.layer_pages(pool[0], 0)
    native.quantize_block(x, y, cache.layout.layers[0].page, sink_tokens=0, out=pages)
    batch, prefix = cache.batch([[0]], [1]), cache.prefix([0])
    batch, prefix = dataclasses.replace(batch, pool=pool), dataclasses.replace(prefix, pool=pool)
    native.decode_attention(query, batch, layer=0, scale=1.0)
    native.chunk_attention(query.transpose(0, 1), k, v, prefix, layer=0, scale=1.0)
