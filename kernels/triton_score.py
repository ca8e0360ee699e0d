"""From products of queries and keys to scores, in the attention kernels. Twin: `reference.ScoreRule`."""

# Triton is untyped, and the annotations of a kernel are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
LOWEST = tl.constexpr(-1e30)
"""Score below every score; finite, so that differences of two stay numbers."""
TWO_LOG2E = tl.constexpr(2 * LOG2E)


@triton.jit
def log2_scores(products, scale_log2, SOFTCAP: tl.constexpr):
    """Scores in units of log2(e): scaled products, soft-capped unless SOFTCAP is 0. -inf stays -inf without a cap, and
    becomes -SOFTCAP with one: mask afterwards."""
    scores = products * scale_log2
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1): right at both ends, where exp is 0 or infinite.
        power = tl.exp2(scores * (2.0 / SOFTCAP))
        scores = (SOFTCAP * TWO_LOG2E / 2) * (1.0 - 2.0 / (power + 1.0))
    return scores
