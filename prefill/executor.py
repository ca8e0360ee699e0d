"""The seam between the prefill loop and whoever computes: one device, or a group of ranks that each hold a shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvferry.kernels.forward import AttentionStep, CausalModel, padded_rows
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.packed import PackedKernels
from kvferry.prefill.chunk_step import ChunkStep
from kvferry.prefill.prompt_blocks import LocalPromptBlocks, PromptBlocks


@dataclass(frozen=True, kw_only=True)
class PrefillPass:
    """Consecutive complete blocks of a prompt, or its incomplete last one."""

    index: int
    """Block at which the pass begins."""
    begin: int
    """Position of its first token."""
    token_ids: Sequence[int]
    wants_logits: bool
    """Of the last token."""


class PrefillExecutor(Protocol):
    """Holds prompts' blocks and runs passes over them. One pass at a time, all from one thread."""

    @property
    def layout(self) -> BlockLayout:
        """Of whole blocks, as they are stored and moved."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def new_blocks(self, num_tokens: int) -> PromptBlocks:
        """Room for the blocks of a prompt; it is freed with the last reference to them."""
        ...

    def run(self, blocks: PromptBlocks, work: PrefillPass, on_layer: Callable[[int], None]) -> Tensor | None:
        """Computes and packs; returns fp32 logits [vocab_size] where they are wanted. `blocks` are its own.

        `on_layer` is called with each layer, in order, once `blocks.layer_share` has it; it must not block.
        """
        ...


class LocalPrefill:
    """`PrefillExecutor` on one device."""

    def __init__(self, model: CausalModel, kernels: PackedKernels, layout: BlockLayout, device: torch.device) -> None:
        self.layout = layout
        self._model = model
        self._kernels = kernels
        self._device = device

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def new_blocks(self, num_tokens: int) -> LocalPromptBlocks:
        return LocalPromptBlocks(self.layout, num_tokens, self._device)

    def run(self, blocks: PromptBlocks, work: PrefillPass, on_layer: Callable[[int], None]) -> Tensor | None:
        assert isinstance(blocks, LocalPromptBlocks)
        step = ChunkStep(blocks, work.index, len(work.token_ids), self._kernels, on_layer=on_layer)
        return run_pass(self._model, step, work, self._device)


def run_pass(model: CausalModel, step: AttentionStep, work: PrefillPass, device: torch.device) -> Tensor | None:
    """The model's part of a pass: fp32 logits [vocab_size] of the last token where they are wanted."""
    num_tokens = len(work.token_ids)
    padding = [0] * (padded_rows(num_tokens) - num_tokens)
    hidden = model.hidden(
        torch.tensor([*work.token_ids, *padding], device=device),
        torch.tensor([*range(work.begin, work.begin + num_tokens), *padding], device=device),
        step,
    )
    if not work.wants_logits:
        return None
    return model.logits(hidden[num_tokens - 1].expand(padded_rows(1), -1).contiguous())[0]
