"""Loading the library, and saying why not."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvferry.kernels.cpu import NativeKernels, NativeUnavailable, load
from kvferry.kernels.cpu import native as module
from kvferry.kernels.cpu.structs import ARGUMENTS, ChunkArgs
from kvferry.kernels.dispatch import select_kernels


@pytest.fixture(autouse=True)
def fresh_cache() -> Iterator[None]:
    module._library.cache_clear()
    yield
    module._library.cache_clear()


def test_load(native: NativeKernels) -> None:
    assert native.name == load(64).name == "cpu-avx2-int8x2/3"


def test_names_say_how_many_terms(native: NativeKernels) -> None:
    """The name is part of the numerics class: workers of different terms must not share blocks unawares."""
    cpu = torch.device("cpu")
    assert select_kernels(cpu, head_dim=64, impl="cpu").kernels.name == "cpu-avx2-int8x2/3"
    assert select_kernels(cpu, head_dim=64, impl="cpu-int8").kernels.name == "cpu-avx2-int8/3"
    with pytest.raises(ValueError, match="head_dim 48"):
        select_kernels(cpu, head_dim=48, impl="cpu-int8")
    with pytest.raises(ValueError, match="terms must be one of"):
        load(terms=3)


def test_openmp_is_the_one_of_torch(native: NativeKernels) -> None:
    """Without it everything is right, but runs on one thread."""
    entry = module._openmp_entry()
    assert entry is not None
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        if begin <= entry < end:
            assert "/torch" in line
            return
    pytest.fail("GOMP_parallel is not in any mapped file")


@pytest.mark.parametrize("head_dim", [16, 48, 160])
def test_head_dim_outside_the_library(native: NativeKernels, head_dim: int) -> None:
    with pytest.raises(NativeUnavailable, match=f"head_dim {head_dim}"):
        load(head_dim)


def test_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "LIBRARY", tmp_path / "_native.so")
    with pytest.raises(NativeUnavailable, match="does not exist"):
        load()


def test_broken_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_native.so").write_bytes(b"not ELF")
    monkeypatch.setattr(module, "LIBRARY", tmp_path / "_native.so")
    with pytest.raises(NativeUnavailable, match="does not load"):
        load()


def test_library_of_other_sources(native: NativeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (("first", ChunkArgs), ("more", ctypes.c_int64))

    monkeypatch.setitem(ARGUMENTS, "chunk", Longer)
    with pytest.raises(NativeUnavailable, match="other sources"):
        load()


def test_other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    with pytest.raises(NativeUnavailable, match="x86-64"):
        load()
