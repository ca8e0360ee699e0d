"""`PackedKernels` by the C library beside this file."""

from __future__ import annotations

import ctypes
import functools
import math
import platform
import weakref
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from kvferry.kernels.cpu import structs
from kvferry.kernels.layout import BlockLayout, LayerLayout
from kvferry.kernels.packed import DecodeBatch, PackedPrefix
from kvferry.kernels.page import PageFormat
from kvferry.kernels.scales import unit_offset, zero_step
from kvferry.kernels.spec import TensorSpec

LIBRARY = Path(__file__).with_name("_native.so")
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
NAMES = {1: "cpu-avx2-int8/3", 2: "cpu-avx2-int8x2/3"}
"""By the terms of decode attention."""

_NOT_FINITE = 1
_MESSAGES = {
    2: f"head_dim is not supported: it must be one of {HEAD_DIMS}",
    3: "a block id is outside the pool",
    4: "a slot is outside sinks and tails",
    5: "num_blocks, tail_lens, block_size or sink_tokens is outside its bounds",
    7: "terms must be 1 or 2",
}
_OUT_OF_MEMORY = 6
_NO_WINDOW = 2**62
_MAX_SINKS = 16
"""A smallest key group: sinks of a page lie in its first one."""


class NativeUnavailable(RuntimeError):
    """Why the native kernels do not run here: not built, not this CPU, not this model."""


class NativeKernels:
    """`PackedKernels` for CPUs with AVX2, FMA and F16C. Made by `load`."""

    def __init__(self, library: ctypes.CDLL, *, terms: int = 2) -> None:
        """`terms`: bytes that stand for a number in decode attention's products. Two are within 1e-3 of the reference,
        one only within 3 to 5 per cent at ordinary scores and up to 16 where they reach 20, but it is faster."""
        if terms not in NAMES:
            raise ValueError(f"terms must be one of {sorted(NAMES)}, not {terms}")
        self.name = NAMES[terms]
        self._terms = terms
        self._quantize = library.kvferry_quantize
        self._decode = library.kvferry_decode
        self._merge = library.kvferry_merge
        self._chunk = library.kvferry_chunk
        self._last_batches: deque[tuple[weakref.ref[DecodeBatch], torch.Size, bytes]] = deque(maxlen=2)
        for function in (self._quantize, self._decode, self._merge, self._chunk):
            function.argtypes = (ctypes.c_void_p,)
            function.restype = ctypes.c_int

    def quantize_block(self, keys: Tensor, values: Tensor, page: PageFormat, *, sink_tokens: int, out: Tensor) -> None:
        """See `PackedKernels`. Any strides over heads and tokens; after a ValueError `out` holds garbage."""
        kv_heads, tokens, head_dim = keys.shape
        pages = tokens // page.tokens
        _expect("keys", keys, torch.float16, (kv_heads, tokens, head_dim), inner=1)
        _expect("values", values, torch.float16, (kv_heads, tokens, head_dim), inner=1)
        if tokens % page.tokens or not 0 <= sink_tokens <= _MAX_SINKS:
            raise ValueError(f"cannot pack {tokens} tokens with {sink_tokens} sinks in pages of {page.tokens}")
        if head_dim != page.head_dim:
            raise ValueError(f"keys of head_dim {head_dim} do not fit pages of {page.head_dim}")
        _expect("out", out, torch.uint8, (kv_heads, pages, page.num_bytes), inner=3)
        args = structs.QuantizeArgs(
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            out=out.data_ptr(),
            key_head_stride=keys.stride(0),
            key_token_stride=keys.stride(1),
            value_head_stride=values.stride(0),
            value_token_stride=values.stride(1),
            kv_heads=kv_heads,
            pages=pages,
            head_dim=head_dim,
            sink_tokens=sink_tokens,
            threads=torch.get_num_threads(),
            page=_page_format(page),
        )
        _raise_for(self._quantize(ctypes.byref(args)))

    def decode_attention(
        self,
        query: Tensor,
        batch: DecodeBatch,
        *,
        layer: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `PackedKernels`. Block ids, slots and lengths are checked at each call."""
        rows = _rows(query)
        out = torch.empty_like(rows)
        self._attend(rows, batch, layer, _rule(scale, window, softcap), out, shares=False)
        return out if query.dtype == torch.float32 else out.to(query.dtype)

    def share_attention(
        self, query: Tensor, share: DecodeBatch, *, layer: int, scale: float, softcap: float | None = None
    ) -> Tensor:
        """See `PackedKernels`; checks as `decode_attention`."""
        rows = _rows(query)
        out = torch.empty((*rows.shape[:-1], rows.shape[-1] + 1), dtype=torch.float32)
        self._attend(rows, share, layer, _rule(scale, None, softcap), out, shares=True)
        return out

    def merge_shares(self, shares: Tensor) -> Tensor:
        """See `PackedKernels`."""
        num_shares, *rows, width = shares.shape
        _expect("shares", shares, torch.float32, (num_shares, *rows, width), inner=1 + len(rows) + 1)
        out = torch.empty((*rows, width - 1), dtype=torch.float32)
        args = structs.MergeArgs(
            shares=shares.data_ptr(),
            out=out.data_ptr(),
            num_shares=num_shares,
            rows=math.prod(rows),
            head_dim=width - 1,
        )
        _raise_for(self._merge(ctypes.byref(args)))
        return out

    def _attend(
        self, rows: Tensor, batch: DecodeBatch, layer: int, rule: structs.ScoreRule, out: Tensor, *, shares: bool
    ) -> None:
        """rows: from `_rows`; out: as the C function writes it."""
        args = self._decode_args(rows, batch)
        share = _share(batch.layout, layer)
        args.page = _page_format(share.page)
        args.rule = rule
        args.query = rows.data_ptr()
        args.out = out.data_ptr()
        args.pool = batch.pool.data_ptr() + share.offset
        args.pool_head_stride = share.head_bytes
        args.sinks = batch.sinks.data_ptr() + 2 * layer * batch.sinks.stride(1)
        args.tails = batch.tails.data_ptr() + 2 * layer * batch.tails.stride(1)
        args.threads = torch.get_num_threads()
        args.shares = shares
        _raise_for(self._decode(ctypes.byref(args)))

    def _decode_args(self, query: Tensor, batch: DecodeBatch) -> structs.DecodeArgs:
        """Fresh arguments, without what changes from layer to layer.

        A model passes one batch to all its layers, or one to those with a window and one to the others, and checking
        it takes longer than a short context's attention (about 10 us), so the arguments of two batches are kept.
        """
        for known, shape, raw in self._last_batches:
            if known() is batch and shape == query.shape:
                return structs.DecodeArgs.from_buffer_copy(raw)
        size, query_heads, head_dim = query.shape
        pool, sinks, tails, tables = batch.pool, batch.sinks, batch.tails, batch.block_tables
        layout = batch.layout
        blocks, layers, kv_heads = pool.shape[0], layout.num_layers, layout.num_kv_heads
        slots, block_size, sink_tokens = tails.shape[0], layout.block_size, sinks.shape[-2]
        head = (layers, kv_heads)
        _expect("pool", pool, torch.uint8, (blocks, layout.block_bytes), 1)
        _expect("sinks", sinks, torch.float16, (slots, *head, 2, sink_tokens, head_dim), 3)
        _expect("tails", tails, torch.float16, (slots, layers, 2, kv_heads, block_size, head_dim), 2)
        _expect("block_tables", tables, torch.int32, (size, tables.shape[1]), 2)
        _expect("num_blocks", batch.num_blocks, torch.int32, (size,), 1)
        _expect("slots", batch.slots, torch.int32, (size,), 1)
        _expect("tail_lens", batch.tail_lens, torch.int32, (size,), 1)
        args = structs.DecodeArgs(
            block_tables=tables.data_ptr(),
            num_blocks=batch.num_blocks.data_ptr(),
            slots=batch.slots.data_ptr(),
            tail_lens=batch.tail_lens.data_ptr(),
            pool_blocks=blocks,
            pool_block_stride=pool.stride(0),
            num_slots=slots,
            sinks_slot_stride=sinks.stride(0),
            sinks_head_stride=sinks.stride(2),
            tails_slot_stride=tails.stride(0),
            tails_value_offset=tails.stride(2),
            tails_head_stride=tails.stride(3),
            table_stride=tables.shape[1],
            batch=size,
            kv_heads=kv_heads,
            group=_group(query_heads, kv_heads),
            head_dim=head_dim,
            sink_tokens=sink_tokens,
            block_size=block_size,
            terms=self._terms,
        )
        self._last_batches.append((weakref.ref(batch), query.shape, bytes(args)))
        return args

    def chunk_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        prefix: PackedPrefix,
        *,
        layer: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `PackedKernels`. Any strides over heads and tokens."""
        layout = prefix.layout
        share = _share(layout, layer)
        query_heads, tokens, head_dim = query.shape
        pool, sinks, table = prefix.pool, prefix.sinks, prefix.table
        blocks, layers, kv_heads = pool.shape[0], layout.num_layers, layout.num_kv_heads
        sink_tokens = sinks.shape[-2]
        _expect("keys", keys, torch.float16, (kv_heads, tokens, head_dim), 1)
        _expect("values", values, torch.float16, (kv_heads, tokens, head_dim), 1)
        _expect("pool", pool, torch.uint8, (blocks, layout.block_bytes), 1)
        _expect("sinks", sinks, torch.float16, (layers, kv_heads, 2, sink_tokens, head_dim), 4)
        _expect("table", table, torch.int32, (table.shape[0],), 1)
        if sink_tokens > _MAX_SINKS:
            raise ValueError(f"{sink_tokens} sinks are more than {_MAX_SINKS}")
        rows = _rows(query)
        out = torch.empty(query.shape, dtype=torch.float32)
        args = structs.ChunkArgs(
            query=rows.data_ptr(),
            out=out.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            pool=pool.data_ptr() + share.offset,
            sinks=sinks.data_ptr() + 2 * layer * sinks.stride(0),
            table=table.data_ptr(),
            query_head_stride=rows.stride(0),
            query_token_stride=rows.stride(1),
            key_head_stride=keys.stride(0),
            key_token_stride=keys.stride(1),
            value_head_stride=values.stride(0),
            value_token_stride=values.stride(1),
            pool_blocks=blocks,
            pool_block_stride=pool.stride(0),
            pool_head_stride=share.head_bytes,
            num_blocks=table.shape[0],
            kv_heads=kv_heads,
            group=_group(query_heads, kv_heads),
            tokens=tokens,
            head_dim=head_dim,
            sink_tokens=sink_tokens,
            block_size=layout.block_size,
            threads=torch.get_num_threads(),
            page=_page_format(share.page),
            rule=_rule(scale, window, softcap),
        )
        _raise_for(self._chunk(ctypes.byref(args)))
        return out if query.dtype == torch.float32 else out.to(query.dtype)


def load(head_dim: int | None = None, *, terms: int = 2) -> NativeKernels:
    """The native kernels, for a model of this `head_dim` when it is given.

    Raises NativeUnavailable, which says why, when they cannot run here.
    """
    library = _library()
    if head_dim is not None and head_dim not in HEAD_DIMS:
        raise NativeUnavailable(f"head_dim {head_dim} is not one of {HEAD_DIMS}")
    return NativeKernels(library, terms=terms)


@functools.cache
def _library() -> ctypes.CDLL:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise NativeUnavailable(f"the native CPU kernels need x86-64, this is {platform.machine()}")
    if not LIBRARY.exists():
        raise NativeUnavailable(f"{LIBRARY} does not exist: it is compiled when kvferry is installed")
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise NativeUnavailable(f"{LIBRARY} does not load: {error}") from error
    if not library.kvferry_cpu_supported():
        raise NativeUnavailable("this CPU lacks AVX2, FMA or F16C")
    for name, args in structs.ARGUMENTS.items():
        size = ctypes.c_int.in_dll(library, f"kvferry_{name}_args_size").value
        if size != ctypes.sizeof(args):
            raise NativeUnavailable(f"{LIBRARY} was compiled from other sources: install kvferry again")
    library.kvferry_set_parallel.argtypes = (ctypes.c_void_p,)
    library.kvferry_set_parallel.restype = None
    library.kvferry_set_parallel(_openmp_entry())
    return library


def _openmp_entry() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch itself uses; None: run on the calling thread.

    A look-up through libtorch_cpu's handle searches its own dependencies, so another libgomp in the process (each
    wheel brings one) is not taken by mistake.
    """
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _share(layout: BlockLayout, layer: int) -> LayerLayout:
    if not 0 <= layer < layout.num_layers:
        raise ValueError(f"layer {layer} is not one of {layout.num_layers}")
    return layout.layers[layer]


@functools.lru_cache(maxsize=256)
def _page_format(page: PageFormat) -> structs.PageFormat:
    o = page.offsets

    def tensor(spec: TensorSpec, codes: int, scale: int, zero: int) -> structs.TensorFormat:
        return structs.TensorFormat(
            codes=codes,
            scale=scale,
            zero=zero,
            bits=spec.bits,
            group=spec.group_size,
            byte_scales=spec.scales == "8bit",
            unit_offset=unit_offset(spec.bits),
            zero_step=zero_step(spec.bits),
            boosted=spec.boosted_channels(page.head_dim),
            boost=o.k_boost,
            channels=o.k_channels,
            boosted_unit_offset=unit_offset(spec.bits + 2),
            boosted_zero_step=zero_step(spec.bits + 2),
        )

    return structs.PageFormat(
        key=tensor(page.spec.key, o.k_codes, o.k_scale, o.k_zero),
        value=tensor(page.spec.value, o.v_codes, o.v_scale, o.v_zero),
        tokens=page.tokens,
        bytes=page.num_bytes,
    )


def _rule(scale: float, window: int | None, softcap: float | None) -> structs.ScoreRule:
    if window is not None and window < 1:
        raise ValueError(f"window {window} must be at least 1")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap {softcap} must be above 0")
    return structs.ScoreRule(window=window or _NO_WINDOW, scale=scale, softcap=softcap or 0.0)


def _rows(query: Tensor) -> Tensor:
    """The query in fp32, contiguous."""
    if query.dtype == torch.float32 and query.is_contiguous() and query.is_cpu:
        return query
    if not query.is_cpu:
        raise ValueError(f"query must be a CPU tensor, not {query.device.type}")
    return query.to(torch.float32).contiguous()


def _expect(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], inner: int) -> None:
    """Refuses x unless it is on the CPU, of this dtype and shape, with its `inner` last dimensions contiguous."""
    if x.dtype != dtype or x.shape != shape or not x.is_cpu:
        raise ValueError(
            f"{name} must be a CPU tensor {dtype} {list(shape)}, not {x.device.type} {x.dtype} {list(x.shape)}"
        )
    strides, expected = x.stride(), 1
    for i in range(1, inner + 1):
        if strides[-i] != expected and shape[-i] != 1 and x.numel():
            raise ValueError(
                f"the last {inner} dimensions of {name} must be contiguous: shape {list(shape)}, strides {strides}"
            )
        expected *= shape[-i]


def _group(query_heads: int, kv_heads: int) -> int:
    if query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads cannot share {kv_heads} KV heads")
    return query_heads // kv_heads


def _raise_for(status: int) -> None:
    if status == _NOT_FINITE:
        raise ValueError("K or V is not finite: the block is refused")
    if status == _OUT_OF_MEMORY:
        raise MemoryError("no memory for the partial results of decode attention")
    if status:
        raise ValueError(_MESSAGES[status])
