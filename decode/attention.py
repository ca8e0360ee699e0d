"""Answers the model's attention in a decode step: each row is the newest token of one sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvferry.decode.cache import PackedCache, StepBatch
from kvferry.kernels.packed import PackedKernels


class DecodeStep:
    """`AttentionStep` of one decode step. Rows past the batch are padding: they attend to nothing and give zeros."""

    def __init__(self, cache: PackedCache, batch: StepBatch, kernels: PackedKernels) -> None:
        self._cache = cache
        self._batch = batch
        self._kernels = kernels
        self._slots = batch.whole.slots.long()
        self._positions = batch.whole.tail_lens.long() - 1

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
        n = self._slots.shape[0]
        tails = self._cache.tails
        tails[self._slots, layer, 0, :, self._positions] = key[:n].to(torch.float16)
        tails[self._slots, layer, 1, :, self._positions] = value[:n].to(torch.float16)
        out = self._kernels.decode_attention(
            query[:n], self._batch.of_layer(layer), layer=layer, scale=scale, window=window, softcap=softcap
        )
        return out if n == query.shape[0] else pad(out, (0, 0, 0, 0, 0, query.shape[0] - n))
