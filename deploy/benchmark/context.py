"""Contexts to decode after: packed blocks, prefilled or filled with random numbers, and transformers' caches."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, QuantizedCache

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kernels.sampling import SampledToken, SamplingParams
from kvferry.prefill.engine import PrefillJob
from kvferry.prefill.prompt_blocks import LocalPromptBlocks

QUANTIZED_BITS = 2
QUANTIZED_GROUP = 64
QUANTIZED_RESIDUAL = 128
"""transformers' defaults: values that share a scale, and newest tokens kept in floating point."""


def prefilled_blocks(
    runtime: ModelRuntime, num_tokens: int, *, timeout_s: float, on_block: Callable[[int], None]
) -> LocalPromptBlocks:
    """Blocks of random tokens by the real prefill engine, chunk by chunk. Raises its error, or TimeoutError."""
    generator = torch.Generator().manual_seed(0)
    outcome: Future[list[SampledToken]] = Future()
    blocks = LocalPromptBlocks(runtime.layout, num_tokens, runtime.loaded.device)
    job = PrefillJob(
        token_ids=torch.randint(runtime.model.vocab_size, (num_tokens,), generator=generator).tolist(),
        sampling=SamplingParams(),
        blocks=blocks,
        on_block=on_block,
        on_done=outcome.set_result,
        on_error=outcome.set_exception,
    )
    runtime.engine.submit(job)
    try:
        outcome.result(timeout_s)
    finally:
        job.cancel()
    return blocks


def random_blocks(runtime: ModelRuntime, num_tokens: int, *, on_block: Callable[[int], None]) -> LocalPromptBlocks:
    """Blocks of random K and V by the real quantizer: the same bytes to read, without the quadratic prefill."""
    layout, kernels = runtime.layout, runtime.selection.kernels
    blocks = LocalPromptBlocks(runtime.layout, num_tokens, runtime.loaded.device)
    generator = torch.Generator(blocks.pool.device).manual_seed(0)
    shape = (2, layout.num_kv_heads, layout.block_size, layout.head_dim)
    for index in range(blocks.num_blocks):
        sink_tokens = layout.spec.sink_tokens if index == 0 else 0
        for layer, share in enumerate(layout.layers):
            keys, values = torch.randn(shape, generator=generator, device=blocks.pool.device).half()
            out = layout.layer_pages(blocks.pool[index], layer)
            kernels.quantize_block(keys, values, share.page, sink_tokens=sink_tokens, out=out)
        blocks.num_ready = index + 1
        on_block(index)
    for part in (blocks.sinks, blocks.tail):
        part.copy_(torch.randn(part.shape, generator=generator, device=part.device))
    return blocks


def dynamic_cache(config: PretrainedConfig, *, batch: int, context: int, dtype: torch.dtype) -> DynamicCache:
    """transformers' default cache, filled with random K and V: the same for each row, but each row's own memory."""
    cache = DynamicCache(config=config)
    _fill(cache, config, batch=batch, context=context, dtype=dtype)
    return cache


def quantized_cache(
    config: PretrainedConfig, *, backend: str, batch: int, context: int, dtype: torch.dtype
) -> QuantizedCache:
    """transformers' quantized cache at 2 bits, filled likewise. `backend`: "hqq" or "quanto"."""
    axis = 1 if backend == "hqq" else 0  # the only ones that they take
    cache = QuantizedCache(
        backend,
        config,
        nbits=QUANTIZED_BITS,
        axis_key=axis,
        axis_value=axis,
        q_group_size=QUANTIZED_GROUP,
        residual_length=QUANTIZED_RESIDUAL,
    )
    _fill(cache, config, batch=batch, context=context, dtype=dtype)
    return cache


@torch.inference_mode()
def _fill(
    cache: DynamicCache | QuantizedCache, config: PretrainedConfig, *, batch: int, context: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def numbers() -> Tensor:
        one = torch.randn((1, config.num_key_value_heads, context, head_dim), generator=generator)
        return one.to(dtype).expand(batch, -1, -1, -1).contiguous()

    for layer in range(config.num_hidden_layers):
        cache.update(numbers(), numbers(), layer)
