"""The seam between an engine and a model: who runs the layers, and who answers their attention.

`prefill` and `decode` each bring an `AttentionStep`; `deploy` injects the `CausalModel`. Rows are tokens: a prefill
chunk is n rows of one sequence, a decode step one row of each of n sequences. The model does not know which.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AttentionStep(Protocol):
    """Takes the place of a model's attention for one forward pass."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """query [n, Hq, D], key and value [n, H, D], after RoPE; returns [n, Hq, D].

        Called once a layer, in order. The step keeps what it needs of key and value. `window` and `softcap`: see
        `PackedKernels.decode_attention`.
        """
        ...


class CausalModel(Protocol):
    """A decoder-only language model without a cache of its own."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        ...

    def hidden(self, token_ids: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        """token_ids, positions: int64 [n] -> final hidden states [n, hidden_size]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [m, hidden_size] -> fp32 [m, vocab_size]."""
        ...


ROW_COUNTS = (4, 8)
"""Row counts below 12 at which a matmul gives a row the bits it has at every count from 12 on (torch 2.13 with MKL,
AVX2 and AVX-512, fp32: other counts below 12 take other code). `deploy` probes it on the machine at start."""


def padded_rows(n: int) -> int:
    """The smallest row count at or above n whose rows have the same bits as in any other padded batch."""
    for count in ROW_COUNTS:
        if n <= count:
            return count
    return max(n, 12)
