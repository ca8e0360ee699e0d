"""The Triton kernels against the reference: in Triton's interpreter everywhere, and compiled where there is a GPU.

Triton decides when it is imported whether kernels are interpreted, for the whole process. So the interpreted checks run
in processes of their own (this file as a script), each case reported as a test here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvferry.kernels.layout import BlockLayout, split_page
from kvferry.kernels.packed import DecodeBatch, PackedPrefix
from kvferry.kernels.reference import ReferenceKernels, dequantize_pages, quantize_pages
from kvferry.kernels.spec import KVQuantSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHARDS = 2
"""Processes for the interpreted cases."""
TOLERANCE = 2e-3
"""Of the largest value: weights and dequantized numbers are fp16 in the kernels, fp32 in the reference."""
LAYER = 1


def triton_kernels() -> Any:
    from kvferry.kernels.triton_kernels import TritonKernels

    return TritonKernels()


# Quantize


def quantize_both(keys: Tensor, values: Tensor, device: torch.device, *, sink_tokens: int = 0) -> tuple[Tensor, Tensor]:
    heads, tokens, head_dim = keys.shape
    out = torch.full((heads, tokens // 32, 24 * head_dim), 255, dtype=torch.uint8, device=device)
    triton_kernels().quantize_block(keys.to(device), values.to(device), sink_tokens=sink_tokens, out=out)
    return out.cpu(), quantize_pages(keys, values, sink_tokens=sink_tokens)


def assert_same_pages(got: Tensor, wanted: Tensor, head_dim: int) -> None:
    """Equal but for ties: sums are taken in another order, which may move a scale or a zero point by its last bit."""
    names = ("K codes", "K scale", "K zero", "V codes", "V scale", "V zero")
    for name, a, b in zip(names, split_page(got, head_dim), split_page(wanted, head_dim), strict=True):
        differ = (a != b).float().mean().item()
        assert differ <= (1e-3 if "codes" in name else 1e-2), f"{name}: {differ:.2%} differ"
        if "codes" not in name:
            torch.testing.assert_close(a, b, rtol=2e-3, atol=0.0, msg=lambda m, n=name: f"{n}: {m}")


def check_quantize(device: torch.device, *, head_dim: int, sink_tokens: int = 0, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 64, head_dim, generator=generator) * factor
    keys[..., 3] *= 8  # an outlier channel
    keys.clamp_(-65504, 65504)
    values = torch.randn(2, 64, head_dim, generator=generator) * factor
    got, wanted = quantize_both(keys.half(), values.half(), device, sink_tokens=sink_tokens)
    assert_same_pages(got, wanted, head_dim)


def check_quantize_constant(device: torch.device, *, head_dim: int) -> None:
    keys = torch.full((1, 32, head_dim), 1.5).half()
    values = torch.zeros(1, 32, head_dim).half()
    values[:, :, 32:] = -3.0
    got, wanted = quantize_both(keys, values, device)
    assert_same_pages(got, wanted, head_dim)
    unpacked_keys, unpacked_values = dequantize_pages(got, head_dim)
    torch.testing.assert_close(unpacked_keys, keys.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(unpacked_values, values.float(), rtol=1e-3, atol=1e-4)


def check_quantize_strided(device: torch.device) -> None:
    tokens_first = torch.randn(32, 2, 2, 64, generator=torch.Generator().manual_seed(0)).half()
    keys, values = tokens_first.permute(1, 2, 0, 3)
    got, wanted = quantize_both(keys, values, device)
    assert_same_pages(got, wanted, 64)


def check_quantize_refuses(device: torch.device, *, bad: float, in_keys: bool) -> None:
    keys = torch.ones(2, 64, 64).half()
    values = torch.ones(2, 64, 64).half()
    (keys if in_keys else values)[1, 63, 63] = bad
    out = torch.empty(2, 2, 24 * 64, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="not finite"):
        triton_kernels().quantize_block(keys.to(device), values.to(device), sink_tokens=0, out=out)


# Decode


def random_pool(layout: BlockLayout, blocks: int, *, key_factor: float = 1.0, value_factor: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (blocks, layout.num_layers, layout.num_kv_heads, layout.block_size, layout.head_dim)
    keys = torch.randn(shape, generator=generator) * key_factor
    values = torch.randn(shape, generator=generator) * value_factor + 0.5 * value_factor
    return quantize_pages(keys.half(), values.half())


def make_layout(head_dim: int, heads: int, *, block_size: int = 32, sinks: int = 4) -> BlockLayout:
    spec = KVQuantSpec(block_size=block_size, sink_tokens=sinks)
    return BlockLayout(num_layers=2, num_kv_heads=heads, head_dim=head_dim, spec=spec)


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
        pool=pool,
        sinks=sinks.half(),
        tails=tails.half(),
        block_tables=tables,
        num_blocks=torch.tensor([len(table) for table, _ in contexts], dtype=torch.int32),
        slots=order,
        tail_lens=torch.tensor([tail for _, tail in contexts], dtype=torch.int32),
    )


def on_device(batch: DecodeBatch, device: torch.device) -> DecodeBatch:
    return DecodeBatch(**{name: tensor.to(device) for name, tensor in vars(batch).items()})


def make_query(batch: DecodeBatch, layout: BlockLayout, group: int) -> Tensor:
    rows = batch.num_blocks.shape[0]
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, layout.num_kv_heads * group, layout.head_dim, generator=generator)


def decode(query: Tensor, batch: DecodeBatch, device: torch.device) -> Tensor:
    result = triton_kernels().decode_attention(
        query.to(device), on_device(batch, device), layer=LAYER, scale=query.shape[-1] ** -0.5
    )
    assert result.dtype == query.dtype
    return result.cpu()


def check_decode(
    device: torch.device,
    *,
    head_dim: int,
    group: int,
    heads: int = 1,
    block_size: int = 32,
    sinks: int = 4,
    dtype: torch.dtype = torch.float32,
    contexts: list[tuple[list[int], int]] | None = None,
    key_factor: float = 1.0,
    value_factor: float = 1.0,
) -> None:
    layout = make_layout(head_dim, heads, block_size=block_size, sinks=sinks)
    contexts = contexts or [([2, 0, 3], 5), ([1], block_size), ([], 1)]
    batch = make_batch(layout, contexts, key_factor=key_factor, value_factor=value_factor)
    query = (make_query(batch, layout, group) / key_factor).to(dtype)
    wanted = ReferenceKernels().decode_attention(query.float(), batch, layer=LAYER, scale=head_dim**-0.5)
    got = decode(query, batch, device)
    tolerance = TOLERANCE if dtype != torch.bfloat16 else 1e-2
    limit = tolerance * wanted.abs().max().item()
    torch.testing.assert_close(got.float(), wanted, rtol=0.0, atol=limit)


def check_pieces_grow(device: torch.device) -> None:
    """Contexts beyond the most pieces, with fewer pieces than the kernels are built for."""
    import triton.language as tl

    from kvferry.kernels import triton_decode

    old = triton_decode.MIN_PIECE, triton_decode.MAX_PIECES
    triton_decode.MIN_PIECE, triton_decode.MAX_PIECES = tl.constexpr(1), tl.constexpr(2)
    try:
        contexts = [(list(range(5)), 3), ([5, 6], 1), ([7], 1)]
        check_decode(device, head_dim=64, group=2, contexts=contexts)
    finally:
        triton_decode.MIN_PIECE, triton_decode.MAX_PIECES = old


def check_decode_alone(device: torch.device) -> None:
    """A sequence has the same bits alone, in a narrow block table, as in a batch."""
    layout = make_layout(64, 1)
    batch = make_batch(layout, [([3, 1], 7), (list(range(10)), 2), ([], 4)])
    query = make_query(batch, layout, 3)
    together = decode(query, batch, device)
    for row in range(3):
        one = slice(row, row + 1)
        alone = DecodeBatch(
            pool=batch.pool,
            sinks=batch.sinks,
            tails=batch.tails,
            block_tables=batch.block_tables[one, : int(batch.num_blocks[row])].contiguous(),
            num_blocks=batch.num_blocks[one],
            slots=batch.slots[one],
            tail_lens=batch.tail_lens[one],
        )
        assert torch.equal(decode(query[one], alone, device), together[one]), f"row {row}"


# Chunk


def run_chunk(
    device: torch.device, *, head_dim: int, group: int, n: int, table: list[int], rows: int
) -> tuple[Tensor, Tensor]:
    """Result of the first `rows` tokens of a chunk of n, and the reference's."""
    layout = make_layout(head_dim, 2, block_size=64)
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(2 * group, n, head_dim, generator=generator)[:, :rows]
    keys = torch.randn(2, n, head_dim, generator=generator).half()[:, :rows]
    values = torch.randn(2, n, head_dim, generator=generator).half()[:, :rows]
    sinks = torch.randn(layout.sink_shape, generator=generator).half()
    pool = random_pool(layout, 3)
    blocks = torch.tensor(table, dtype=torch.int32)
    scale = head_dim**-0.5
    prefix = PackedPrefix(pool=pool, table=blocks, sinks=sinks)
    wanted = ReferenceKernels().chunk_attention(query, keys, values, prefix, layer=LAYER, scale=scale)
    there = PackedPrefix(pool=pool.to(device), table=blocks.to(device), sinks=sinks.to(device))
    got = triton_kernels().chunk_attention(
        query.to(device), keys.to(device), values.to(device), there, layer=LAYER, scale=scale
    )
    return got.cpu(), wanted


def check_chunk(device: torch.device, *, head_dim: int, group: int, n: int, table: list[int]) -> None:
    got, wanted = run_chunk(device, head_dim=head_dim, group=group, n=n, table=table, rows=n)
    torch.testing.assert_close(got, wanted, rtol=0.0, atol=TOLERANCE * wanted.abs().max().item())


def check_chunk_prefix(device: torch.device) -> None:
    """The first tokens of a chunk have the same bits however long the chunk is."""
    long, _ = run_chunk(device, head_dim=64, group=3, n=40, table=[1], rows=40)
    short, _ = run_chunk(device, head_dim=64, group=3, n=40, table=[1], rows=9)
    assert torch.equal(long[:, :9], short)


# Cases

CASES: dict[str, Callable[[torch.device], None]] = {
    "quantize-d64": partial(check_quantize, head_dim=64),
    "quantize-d128": partial(check_quantize, head_dim=128),
    "quantize-d64-sinks": partial(check_quantize, head_dim=64, sink_tokens=4),
    "quantize-d128-sinks": partial(check_quantize, head_dim=128, sink_tokens=4),
    "quantize-huge-values": partial(check_quantize, head_dim=64, factor=8000.0),
    "quantize-tiny-values": partial(check_quantize, head_dim=64, factor=1e-6),
    "quantize-constant-d64": partial(check_quantize_constant, head_dim=64),
    "quantize-constant-d128": partial(check_quantize_constant, head_dim=128),
    "quantize-strided-input": check_quantize_strided,
    "quantize-nan-key-refused": partial(check_quantize_refuses, bad=torch.nan, in_keys=True),
    "quantize-nan-value-refused": partial(check_quantize_refuses, bad=torch.nan, in_keys=False),
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
    "chunk-same-bits-in-a-longer-chunk": check_chunk_prefix,
}
INTERPRETED_CASES = CASES | {"decode-pieces-grow": check_pieces_grow}


# Interpreted


def run_shard(shard: int) -> None:
    """Runs every SHARDS-th case and prints a line of JSON for each: [case, error or null]."""
    torch.set_num_threads(1)
    for name, check in list(INTERPRETED_CASES.items())[shard::SHARDS]:
        error = None
        try:
            check(torch.device("cpu"))
        except (Exception, pytest.fail.Exception):
            error = traceback.format_exc()
        print(json.dumps([name, error]), flush=True)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """Each case's error, from the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
    }
    shards = [
        subprocess.Popen(
            [sys.executable, __file__, str(shard)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for shard in range(SHARDS)
    ]
    results: dict[str, str | None] = {}
    for shard in shards:
        stdout, stderr = shard.communicate()
        assert shard.returncode == 0, stderr
        results |= dict(json.loads(line) for line in stdout.splitlines())
    return results


@pytest.mark.parametrize("case", INTERPRETED_CASES)
def test_interpreted(case: str, interpreted: dict[str, str | None]) -> None:
    error = interpreted[case]
    if error is not None:
        pytest.fail(error, pytrace=False)


# Compiled


on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and no TRITON_INTERPRET")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("case", CASES)
def test_compiled(case: str) -> None:
    CASES[case](torch.device("cuda"))


@pytest.mark.gpu
@on_gpu
def test_decode_replays_in_a_cuda_graph() -> None:
    """One capture serves every context that fits the block table."""
    device = torch.device("cuda")
    layout = make_layout(128, 2)
    first = on_device(make_batch(layout, [([3, 1], 7), ([0, 2], 2)]), device)
    query = make_query(first, layout, 4).to(device)
    kernels = triton_kernels()
    kernels.decode_attention(query, first, layer=LAYER, scale=0.1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.decode_attention(query, first, layer=LAYER, scale=0.1)
    for blocks, tails in (([2, 2], [7, 2]), ([1, 0], [3, 1])):
        first.num_blocks.copy_(torch.tensor(blocks))
        first.tail_lens.copy_(torch.tensor(tails))
        graph.replay()
        wanted = kernels.decode_attention(query, first, layer=LAYER, scale=0.1)
        assert torch.equal(captured, wanted)


if __name__ == "__main__":
    run_shard(int(sys.argv[1]))
