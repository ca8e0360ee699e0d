"""One prefill chunk, all layers: takes K and V out of the model, packs them and answers the model's attention."""

from __future__ import annotations

import torch
from torch import Tensor

from kvferry.kernels.packed import PackedKernels
from kvferry.prefill.prompt_blocks import PromptBlocks


class ChunkStep:
    """`AttentionStep` of one prefill chunk: one block of the canonical grid, or the incomplete last one.

    The chunk attends to all earlier blocks in their packed form and to itself in fp16. On a hit and on a miss these
    are the same bytes, so the result is the same. Rows past `num_tokens` are padding: they give zeros.
    """

    def __init__(self, blocks: PromptBlocks, index: int, num_tokens: int, kernels: PackedKernels) -> None:
        self._blocks = blocks
        self._index = index
        self._num_tokens = num_tokens
        self._kernels = kernels
        self._prefix = blocks.prefix(index)

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
        self._keep(layer, keys, values)
        attended = self._kernels.chunk_attention(
            query[:n].transpose(0, 1),
            keys,
            values,
            self._prefix,
            layer=layer,
            scale=scale,
            window=window,
            softcap=softcap,
        ).transpose(0, 1)
        if n == query.shape[0]:
            return attended
        out = torch.zeros_like(query)
        out[:n] = attended
        return out

    def _keep(self, layer: int, keys: Tensor, values: Tensor) -> None:
        blocks, index = self._blocks, self._index
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
