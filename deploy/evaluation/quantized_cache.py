"""transformers' own quantized cache as a baseline (its quanto backend; `pip install 'kvferry[eval]'`).

It is fed token by token, as its `generate` would, because what it has quantized depends on the steps before.
"""

from __future__ import annotations

import importlib.metadata

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, QuantizedCache

from kvferry.deploy.evaluation.packed import Observer
from kvferry.deploy.models import LoadedModel

GROUP = 64
RESIDUAL = 128
"""Its defaults: values that share a scale, and newest tokens kept in floating point."""


def is_installed() -> bool:
    try:
        importlib.metadata.version("optimum-quanto")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class QuantizedCacheContender:
    """The same weights in plain transformers, SDPA attention."""

    def __init__(self, loaded: LoadedModel, bits: int, *, bits_context: int) -> None:
        self._bits = bits
        self._model = AutoModelForCausalLM.from_pretrained(loaded.source.path, dtype=loaded.model.dtype).eval()
        # Scale and shift are as wide as the model's numbers; counted as 16 bits here, in its favour.
        packed = bits + 2 * 16 / GROUP
        self.effective_bits = packed + (16 - packed) * (RESIDUAL / 2) / bits_context

    @torch.inference_mode()
    def observe(self, windows: Tensor, *, context: int, observer: Observer) -> None:
        cache = QuantizedCache(
            "quanto", self._model.config, nbits=self._bits, q_group_size=GROUP, residual_length=RESIDUAL
        )
        self._model(windows[:, :context], past_key_values=cache, logits_to_keep=1)
        for index in range(windows.shape[1] - context - 1):
            read = windows[:, context + index, None]
            logits = self._model(read, past_key_values=cache).logits[:, -1]
            for window, row in enumerate(logits):
                observer(window, index, row)
