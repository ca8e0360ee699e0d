"""One prefill pass, all layers: takes K and V out of the model, packs them and answers the model's attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvferry.kernels.packed import PackedKernels
from kvferry.prefill.prompt_blocks import LocalPromptBlocks


class ChunkStep:
    """`AttentionStep` of one prefill pass: consecutive blocks of the canonical grid, or the incomplete last one.

    Each block attends to all earlier blocks in their packed form and to itself in fp16. In every layer the blocks of
    the pass are packed one after the other, each before the next one attends to it, so the result is the same for
    every way of dividing a prompt into passes. Rows past `num_tokens` are padding: they give zeros.
    """

    def __init__(
        self,
        blocks: LocalPromptBlocks,
        index: int,
        num_tokens: int,
        kernels: PackedKernels,
        *,
        on_layer: Callable[[int], None] = lambda layer: None,
    ) -> None:
        """A pass over the `num_tokens` tokens from the beginning of block `index` on. `on_layer` is called with each
        layer once the pass's blocks are packed in it, and must not block."""
        self._on_layer = on_layer
        self._blocks = blocks
        self._num_tokens = num_tokens
        self._kernels = kernels
        size = blocks.layout.block_size
        self._spans = [
            (index + offset // size, slice(offset, min(offset + size, num_tokens)))
            for offset in range(0, num_tokens, size)
        ]
        self._prefixes = [blocks.prefix(block) for block, _ in self._spans]

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
        n = self._num_tokens
        keys = key[:n].transpose(0, 1).to(torch.float16).contiguous()  # [H, n, D]
        values = value[:n].transpose(0, 1).to(torch.float16).contiguous()
        queries = query.transpose(0, 1)
        outputs = []
        for (block, span), prefix in zip(self._spans, self._prefixes, strict=True):
            own_keys, own_values = keys[:, span], values[:, span]
            self._keep(layer, block, own_keys, own_values)
            attended = self._kernels.chunk_attention(
                queries[:, span],
                own_keys,
                own_values,
                prefix,
                layer=layer,
                scale=scale,
                window=window,
                softcap=softcap,
            )
            outputs.append(attended.transpose(0, 1))
        self._on_layer(layer)
        if n < query.shape[0]:
            outputs.append(torch.zeros_like(query[n:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _keep(self, layer: int, index: int, keys: Tensor, values: Tensor) -> None:
        blocks = self._blocks
        if index == blocks.num_blocks:
            blocks.tail[layer, 0] = keys
            blocks.tail[layer, 1] = values
            return
        sink_tokens = blocks.layout.spec.sink_tokens if index == 0 else 0
        if sink_tokens:
            blocks.sinks[layer, :, 0] = keys[:, :sink_tokens]
            blocks.sinks[layer, :, 1] = values[:, :sink_tokens]
        page = blocks.layout.layers[layer].page
        out = blocks.layout.layer_pages(blocks.pool[index], layer)
        self._kernels.quantize_block(keys, values, page, sink_tokens=sink_tokens, out=out)
