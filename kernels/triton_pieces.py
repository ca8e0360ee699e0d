"""Pieces of a context, and what a window leaves of it.

A context is cut into pieces by its own length (and the window) alone, so a sequence's bits do not depend on what else
is in the batch. Positions count from the start of the sequence, tiles are 32 tokens.
"""

# Triton is untyped, and the annotations of a kernel are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from kvferry.kernels.spec import PAGE

TILE = tl.constexpr(PAGE)
MIN_PIECE = tl.constexpr(8)
"""Tiles of the smallest piece. A tile is 3 KB at D = 128; a piece's partial result is 2 KB at 4 heads."""
MAX_PIECES = tl.constexpr(64)
"""Pieces of the longest context: beyond MIN_PIECE * MAX_PIECES tiles (16,384 tokens) pieces grow."""


@triton.jit
def tiles_per_piece(num_tiles):
    """Tiles of every piece but the last, from how many of a context's tiles are seen."""
    return tl.maximum(MIN_PIECE, tl.cdiv(num_tiles, MAX_PIECES))


@triton.jit
def first_seen(num_blocks, tail_lens_ptr, row, BLOCK_TILES: tl.constexpr, WINDOW: tl.constexpr):
    """The first position that the newest token sees; WINDOW 0: none."""
    if WINDOW > 0:
        return tl.maximum(num_blocks * (BLOCK_TILES * TILE) + tl.load(tail_lens_ptr + row) - WINDOW, 0)
    else:
        return 0


@triton.jit
def skipped_tiles(num_tiles, seen, WINDOW: tl.constexpr):
    """Packed tiles that lie before position `seen`."""
    if WINDOW > 0:
        return tl.minimum(seen // TILE, num_tiles)
    else:
        return 0


def max_pieces(num_tiles: int, window: int) -> int:
    """Pieces of a context of at most `num_tiles` tiles: a launch must have as many. A window of 0 is none."""
    if window:
        num_tiles = min(num_tiles, -(-window // PAGE) + 1)
    return min(int(MAX_PIECES.value), -(-num_tiles // int(MIN_PIECE.value)))
