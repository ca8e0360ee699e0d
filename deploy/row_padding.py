"""How many rows a decode step of so many sequences runs."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvferry.deploy.rank_model import INVARIANT_ROWS
from kvferry.kernels.forward import padded_rows

logger = logging.getLogger(__name__)


def row_padding(rows_invariant: bool, max_num_seqs: int) -> Callable[[int], int]:
    """Few row counts where a row keeps its bits at all of them, else always the largest."""
    if rows_invariant and max_num_seqs <= INVARIANT_ROWS:
        return padded_rows
    logger.warning("on this machine a matmul's rows depend on their number: every step runs %d rows", max_num_seqs)
    return lambda n: max_num_seqs
