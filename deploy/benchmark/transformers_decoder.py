"""Plain transformers as a baseline: its model, SDPA attention and one of its caches, decoding as `generate` does."""

from __future__ import annotations

import importlib.util

import torch
from transformers import Cache, PreTrainedModel

from kvferry.deploy.benchmark.step_time import StepTime, now

QUANTIZED_BACKENDS = {"hqq": "hqq", "quanto": "optimum.quanto"}
"""Backends of its quantized cache, and what each imports."""
QUANTIZED_MISSING = "transformers' quantized cache is not measured: pip install 'kvferry[eval]'"


def quantized_backend() -> str | None:
    """The backend that is installed, or None."""
    for name, module in QUANTIZED_BACKENDS.items():
        package = module.split(".", maxsplit=1)[0]
        if importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None:
            return name
    return None


class TransformersDecoder:
    """`batch` sequences on a filled cache, decoded greedily."""

    def __init__(self, model: PreTrainedModel, cache: Cache, *, batch: int) -> None:
        self._model = model
        self._cache = cache
        self._next = torch.ones((batch, 1), dtype=torch.long)

    @torch.inference_mode()
    def run(self, steps: int) -> list[StepTime]:
        """Times of each step."""
        times = []
        for _ in range(steps):
            started = now()
            out = self._model(self._next, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._next = out.logits[:, -1].argmax(-1, keepdim=True)
            self._next.tolist()  # as a caller that prints them would
            times.append(now().since(started))
        return times

    def close(self) -> None:
        """Gives the cache up."""
        del self._cache
