"""The C kernels against the reference on random formats, shapes, lengths, tables and rules.

A few examples in every run; `KVFERRY_DEEP=10000 pytest tests/kernels/test_cpu_random.py` makes it a long one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvferry.kernels.cpu import NativeKernels
from kvferry.kernels.reference import ReferenceKernels, quantize_pages
from kvferry.kernels.spec import CODE_BITS, GROUP_SIZES, SCALES, LayerSpec, TensorSpec

EXAMPLES = int(os.environ.get("KVFERRY_DEEP", "60"))
DECODE_RATIO = 1e-3
CHUNK_RATIO = 1e-4
STRENGTH = 0.5
"""Of queries: scores reach 20."""
reference = ReferenceKernels()


@st.composite
def tensors(draw: st.DrawFn, *, is_key: bool) -> TensorSpec:
    bits = draw(st.sampled_from(CODE_BITS))
    scales = draw(st.sampled_from(SCALES)) if bits != 8 else "fp16"
    boost = draw(st.integers(0, 15)) if is_key and bits <= 4 else 0
    return TensorSpec(bits=bits, group_size=draw(st.sampled_from(GROUP_SIZES)), scales=scales, boost=boost)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    layer = LayerSpec(key=draw(tensors(is_key=True)), value=draw(tensors(is_key=False)))
    block_size = draw(st.sampled_from([size for size in (32, 64, 128) if size % layer.page_tokens == 0]))
    return {
        "layer": layer,
        "block_size": block_size,
        "head_dim": draw(st.sampled_from((32, 64, 80, 96, 128, 256))),
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 16)),
        "sink_tokens": draw(st.integers(0, 16)),
        "lengths": draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)),
        "tails": draw(st.lists(st.integers(1, block_size), min_size=3, max_size=3)),
        "order": draw(st.permutations(range(12))),
        "chunk": draw(st.integers(1, block_size)),
        "window": draw(st.none() | st.integers(1, 5 * block_size)),
        "softcap": draw(st.none() | st.floats(1.0, 50.0)),
        "seed": draw(st.integers(0, 2**31)),
    }


@pytest.mark.timeout(max(300, EXAMPLES))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases())
def test_random_cases(
    native: NativeKernels,
    make_cache: Callable[..., Any],
    assert_close: Callable[[str, Tensor, Tensor, float], None],
    case: dict[str, Any],
) -> None:
    torch.manual_seed(case["seed"])
    cache = make_cache(
        head_dim=case["head_dim"],
        kv_heads=case["kv_heads"],
        num_layers=1,
        blocks=12,
        block_size=case["block_size"],
        sink_tokens=case["sink_tokens"],
        layer=case["layer"],
    )
    rule = {"layer": 0, "scale": cache.scale, "window": case["window"], "softcap": case["softcap"]}
    order = list(case["order"])
    tables = [[order.pop() for _ in range(length)] for length in case["lengths"] if length <= len(order)]
    batch = cache.batch(tables, case["tails"][: len(tables)])
    query = STRENGTH * cache.query(case["group"], len(tables))
    expected = reference.decode_attention(query, batch, **rule)
    actual = native.decode_attention(query, batch, **rule)
    for row in range(len(tables)):
        assert_close(f"decode row {row}", expected[row], actual[row], DECODE_RATIO)

    keys, values = torch.randn(2, case["kv_heads"], case["chunk"], case["head_dim"]).half()
    query = STRENGTH * cache.query(case["group"], case["chunk"]).transpose(0, 1)
    prefix = cache.prefix(tables[0])
    expected = reference.chunk_attention(query, keys, values, prefix, **rule)
    assert_close("chunk", expected, native.chunk_attention(query, keys, values, prefix, **rule), CHUNK_RATIO)

    page = cache.layout.layers[0].page
    keys, values = (torch.randn(2, case["kv_heads"], case["block_size"], case["head_dim"]) * 3).half()
    out = torch.empty(case["kv_heads"], case["block_size"] // page.tokens, page.num_bytes, dtype=torch.uint8)
    native.quantize_block(keys, values, page, sink_tokens=case["sink_tokens"], out=out)
    assert torch.equal(out, quantize_pages(keys, values, page, sink_tokens=case["sink_tokens"]))
