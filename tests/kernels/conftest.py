"""Poisoned memory, and random packed caches."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvferry.kernels.cpu import NativeKernels, NativeUnavailable, load
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.packed import DecodeBatch, PackedPrefix
from kvferry.kernels.reference import quantize_pages
from kvferry.kernels.spec import KVQuantSpec


def poison(x: Tensor) -> Tensor:
    """NaN in every floating type, all ones elsewhere: what is not overwritten shows."""
    if x.is_floating_point():
        return x.fill_(torch.nan)
    return x.view(torch.uint8).fill_(255).view(x.dtype) if x.numel() and x.is_contiguous() else x


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` returns poison, so output that a kernel leaves unwritten fails its test."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture(autouse=True)
def seeded_and_serial() -> Iterator[None]:
    """One thread: these tensors are too small for more, and threads that wait for a busy core take all the time."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(seeded_and_serial: None) -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def native() -> NativeKernels:
    """Skips only where the native kernels cannot exist; a missing library on a fitting CPU is a failure."""
    try:
        return load()
    except NativeUnavailable as reason:
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        if platform.machine() != "x86_64" or " avx2 " not in flags:
            pytest.skip(str(reason))
        pytest.fail(f"this CPU could run the native kernels: {reason}")


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A random packed cache: a pool whose blocks nobody uses are poison, and blocks out of order."""

    layout: BlockLayout
    pool: Tensor
    sinks: Tensor
    tails: Tensor

    @property
    def scale(self) -> float:
        return float(self.layout.head_dim**-0.5)

    def query(self, group: int, *lead: int) -> Tensor:
        """[*lead, Hq, D], weak heads and strong ones: scores reach 40."""
        heads = self.layout.num_kv_heads * group
        q = torch.randn(*lead, heads, self.layout.head_dim)
        return q * torch.linspace(0.2, 2.0, heads)[:, None]

    def batch(self, tables: list[list[int]], tail_lens: list[int], slots: list[int] | None = None) -> DecodeBatch:
        """Tables of unequal length; unused entries are block ids outside the pool."""
        width = max(1, *(len(t) for t in tables))
        padded = [t + [2**30] * (width - len(t)) for t in tables]
        int32 = torch.int32
        return DecodeBatch(
            layout=self.layout,
            pool=self.pool,
            sinks=self.sinks,
            tails=self.tails,
            block_tables=torch.tensor(padded, dtype=int32),
            num_blocks=torch.tensor([len(t) for t in tables], dtype=int32),
            slots=torch.tensor(slots or list(range(len(tables))), dtype=int32),
            tail_lens=torch.tensor(tail_lens, dtype=int32),
        )

    def prefix(self, table: list[int], slot: int = 0) -> PackedPrefix:
        return PackedPrefix(
            layout=self.layout, pool=self.pool, table=torch.tensor(table, dtype=torch.int32), sinks=self.sinks[slot]
        )


CacheFactory = Callable[..., Cache]


@pytest.fixture
def make_cache() -> CacheFactory:
    def make(
        *,
        head_dim: int = 64,
        kv_heads: int = 2,
        num_layers: int = 2,
        blocks: int = 9,
        slots: int = 4,
        block_size: int = 128,
        sink_tokens: int = 4,
        unused: tuple[int, ...] = (),
        **layers: Any,
    ) -> Cache:
        spec = KVQuantSpec(block_size=block_size, sink_tokens=sink_tokens, **layers)
        layout = BlockLayout(num_layers=num_layers, num_kv_heads=kv_heads, head_dim=head_dim, spec=spec)
        shape = (blocks, kv_heads, block_size, head_dim)
        channels = torch.rand(head_dim).mul(2).exp()  # outlier channels, as keys have
        pool = torch.empty(blocks, layout.block_bytes, dtype=torch.uint8)
        for index, layer in enumerate(layout.layers):
            keys, values = (torch.randn(shape) * channels).half(), torch.randn(shape).half()
            layout.layer_pages(pool, index).copy_(quantize_pages(keys, values, layer.page))
        for block in unused:
            pool[block] = 255
        return Cache(
            layout=layout,
            pool=pool,
            sinks=torch.randn(slots, *layout.sink_shape).half(),
            tails=torch.randn(slots, *layout.tail_shape).half(),
        )

    return make


@pytest.fixture
def assert_close() -> Callable[[str, Tensor, Tensor, float], None]:
    """assert_close(name, expected, actual, ratio): the largest error, relative to the largest expected value."""

    def check(name: str, expected: Tensor, actual: Tensor, ratio: float) -> None:
        assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
        assert actual.isfinite().all(), f"{name} is not finite"
        error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert error <= ratio, f"{name}: error {error:.2e}, allowed {ratio:.0e}"

    return check
