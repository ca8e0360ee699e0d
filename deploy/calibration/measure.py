"""How much each layer's K and V suffer from fewer bits, one at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kvferry.deploy.evaluation.dense import DenseStep, per_query_head, weights
from kvferry.kernels.forward import AttentionStep, CausalModel
from kvferry.kernels.packed import PackedKernels
from kvferry.kernels.page import PageFormat
from kvferry.kernels.reference import ScoreRule, dequantize_pages
from kvferry.kernels.spec import KVQuantSpec, LayerSpec, TensorSpec

EXACT = TensorSpec(bits=16)


class OneTensorStep:
    """`AttentionStep` over one whole sequence: the canonical rule, with K or V of one layer quantized.

    A query sees earlier blocks as the product's quantizer stores them, its own block and the sinks as they are.
    """

    def __init__(self, spec: KVQuantSpec, kernels: PackedKernels, *, layer: int, side: str, tensor: TensorSpec) -> None:
        self._spec = spec
        self._kernels = kernels
        self._layer = layer
        self._layer_spec = LayerSpec(**{"key": EXACT, "value": EXACT, side: tensor})

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
        rule = ScoreRule(scale, window, softcap)
        q, k, v = query.float().transpose(0, 1), per_query_head(key, query), per_query_head(value, query)
        if layer != self._layer:
            return (weights(q @ k.mT, rule) @ v).transpose(0, 1).to(query.dtype)
        packed_key, packed_value = self._stored(key, value)
        packed_k, packed_v = per_query_head(packed_key, query), per_query_head(packed_value, query)
        position, other = torch.arange(query.shape[0])[:, None], torch.arange(query.shape[0])
        block = self._spec.block_size
        earlier = (other // block < position // block) & (other >= self._spec.sink_tokens)
        p = weights(torch.where(earlier, q @ packed_k.mT, q @ k.mT), rule)
        out = (p * earlier) @ packed_v + (p * ~earlier) @ v
        return out.transpose(0, 1).to(query.dtype)

    def _stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value [n, H, D], n a multiple of the block -> what a reader of their blocks sees."""
        page = PageFormat(key.shape[-1], self._layer_spec)
        block = self._spec.block_size
        keys, values = [], []
        for begin in range(0, key.shape[0], block):
            k, v = (x[begin : begin + block].transpose(0, 1).half().contiguous() for x in (key, value))
            out = torch.empty(k.shape[0], block // page.tokens, page.num_bytes, dtype=torch.uint8)
            sinks = self._spec.sink_tokens if begin == 0 else 0
            self._kernels.quantize_block(k, v, page, sink_tokens=sinks, out=out)
            stored = dequantize_pages(out, page)
            keys.append(stored[0].transpose(0, 1))
            values.append(stored[1].transpose(0, 1))
        return torch.cat(keys), torch.cat(values)


class Yardstick:
    """Windows of a text and what the model says on an unquantized cache."""

    def __init__(self, model: CausalModel, windows: Tensor, *, skip: int) -> None:
        """windows: int64 [W, n], n a multiple of the block; the first `skip` predictions of each do not count."""
        self._model = model
        self._windows = windows
        self._skip = skip
        self._expected = [self._log_probs(window, DenseStep()) for window in windows]

    def kl(self, step: AttentionStep) -> float:
        """Mean KL divergence from the unquantized cache, nats a token."""
        total, count = 0.0, 0
        for window, expected in zip(self._windows, self._expected, strict=True):
            ours = self._log_probs(window, step)
            total += float(torch.nn.functional.kl_div(ours, expected, reduction="sum", log_target=True))
            count += ours.shape[0]
        return max(0.0, total / count)

    def _log_probs(self, window: Tensor, step: AttentionStep) -> Tensor:
        hidden = self._model.hidden(window, torch.arange(len(window)), step)
        return self._model.logits(hidden[self._skip :]).log_softmax(-1)
