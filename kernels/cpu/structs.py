"""The arguments of the C library's functions, field by field as in its structs."""

from __future__ import annotations

import ctypes


class TensorFormat(ctypes.Structure):
    """struct tensor_format of page.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("codes", "scale", "zero", "bits", "group", "byte_scales")),
        *((name, ctypes.c_float) for name in ("unit_offset", "zero_step")),
        *((name, ctypes.c_int64) for name in ("boosted", "boost", "channels")),
        *((name, ctypes.c_float) for name in ("boosted_unit_offset", "boosted_zero_step")),
    )


class PageFormat(ctypes.Structure):
    """struct page_format of page.h."""

    _fields_ = (
        ("key", TensorFormat),
        ("value", TensorFormat),
        ("tokens", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
    )


class ScoreRule(ctypes.Structure):
    """struct score_rule of rule.h."""

    _fields_ = (("window", ctypes.c_int64), ("scale", ctypes.c_float), ("softcap", ctypes.c_float))


class QuantizeArgs(ctypes.Structure):
    """struct quantize_args of quantize.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "out")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "key_head_stride",
                "key_token_stride",
                "value_head_stride",
                "value_token_stride",
                "kv_heads",
                "pages",
                "head_dim",
                "sink_tokens",
                "threads",
            )
        ),
        ("page", PageFormat),
    )


class DecodeArgs(ctypes.Structure):
    """struct decode_args of decode.c."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "query",
                "out",
                "pool",
                "sinks",
                "tails",
                "block_tables",
                "num_blocks",
                "slots",
                "tail_lens",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "pool_blocks",
                "pool_block_stride",
                "pool_head_stride",
                "num_slots",
                "sinks_slot_stride",
                "sinks_head_stride",
                "tails_slot_stride",
                "tails_value_offset",
                "tails_head_stride",
                "table_stride",
                "batch",
                "kv_heads",
                "group",
                "head_dim",
                "sink_tokens",
                "block_size",
                "threads",
                "terms",
                "shares",
            )
        ),
        ("page", PageFormat),
        ("rule", ScoreRule),
    )


class ChunkArgs(ctypes.Structure):
    """struct chunk_args of chunk.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "out", "keys", "values", "pool", "sinks", "table")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "query_head_stride",
                "query_token_stride",
                "key_head_stride",
                "key_token_stride",
                "value_head_stride",
                "value_token_stride",
                "pool_blocks",
                "pool_block_stride",
                "pool_head_stride",
                "num_blocks",
                "kv_heads",
                "group",
                "tokens",
                "head_dim",
                "sink_tokens",
                "block_size",
                "threads",
            )
        ),
        ("page", PageFormat),
        ("rule", ScoreRule),
    )


class MergeArgs(ctypes.Structure):
    """struct merge_args of decode.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("shares", "out")),
        *((name, ctypes.c_int64) for name in ("num_shares", "rows", "head_dim")),
    )


ARGUMENTS = {"quantize": QuantizeArgs, "decode": DecodeArgs, "merge": MergeArgs, "chunk": ChunkArgs}
"""By the name of the function: `kvferry_<name>`."""
