"""A follower's share of every context: the packed blocks that it holds, and attention to them.

It has no part of the model: queries come to it, and its partial results go back (`kernels.packed.share_attention`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvferry.decode.cache import split_layers
from kvferry.deploy.layer_windows import LayerRule
from kvferry.deploy.ranks.guarded_step import FirstError, agree
from kvferry.deploy.spec_file import spec_from_json, spec_to_json
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.packed import DecodeBatch, PackedKernels

logger = logging.getLogger(__name__)

WHAT = "attend to its share of a context"
"""What a rank could not do when it was not the others' fault."""


@dataclass(frozen=True, kw_only=True)
class ShareConfig:
    """What a follower holds; all followers alike."""

    layout: BlockLayout
    """Of whole blocks."""
    windows: tuple[int | None, ...]
    rules: tuple[LayerRule, ...]
    num_blocks: int
    """Of each rank."""

    def to_message(self) -> dict[str, Any]:
        layout = self.layout
        rules = [r._asdict() | {"query_dtype": str(r.query_dtype).removeprefix("torch.")} for r in self.rules]
        return {
            "num_layers": layout.num_layers,
            "num_kv_heads": layout.num_kv_heads,
            "head_dim": layout.head_dim,
            "spec": spec_to_json(layout.spec),
            "windows": self.windows,
            "rules": rules,
            "num_blocks": self.num_blocks,
        }

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> ShareConfig:
        """Raises KeyError, ValueError or TypeError for what `to_message` did not make."""
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        return cls(
            layout=BlockLayout(
                spec=spec_from_json(message["spec"]),
                **{name: message[name] for name in ("num_layers", "num_kv_heads", "head_dim")},
            ),
            windows=tuple(message["windows"]),
            rules=tuple(LayerRule(**r | {"query_dtype": dtypes[r["query_dtype"]]}) for r in message["rules"]),
            num_blocks=message["num_blocks"],
        )


class Exchange(Protocol):
    """What leader and followers exchange in each layer that sees everything: `collectives.ProcessGroup`."""

    def broadcast(self, tensor: Tensor) -> None: ...

    def gather(self, part: Tensor) -> Tensor: ...

    def all_true(self, flag: bool) -> bool: ...


def empty_part(query: Tensor) -> Tensor:
    """What `share_attention` gives for a share without blocks: fp32 [B, Hq, D + 1] for a query [B, Hq, D]."""
    part = torch.zeros((*query.shape[:-1], query.shape[-1] + 1), dtype=torch.float32, device=query.device)
    part[..., -1] = -torch.inf
    return part


class ContextShare:
    """The commands of a follower, by name."""

    def __init__(self, config: ShareConfig, kernels: PackedKernels, device: torch.device) -> None:
        _, self._layout, _ = split_layers(config.layout, config.windows)
        self._rules = config.rules
        self._kernels = kernels
        self._device = device
        self._pool = torch.empty((config.num_blocks, self._layout.block_bytes), dtype=torch.uint8, device=device)
        self._saved: dict[int, tuple[Tensor, list[Tensor]]] = {}
        layers, two, heads, block_size, dim = config.layout.tail_shape
        self._no_sinks = torch.zeros((1, layers, heads, two, 0, dim), dtype=torch.float16, device=device)
        one_tail = torch.zeros((1, 1, 1, 1, block_size, dim), dtype=torch.float16, device=device)
        self._no_tails = one_tail.expand(1, layers, two, heads, -1, -1)

    def write(self, block: int, offset: int, data: bytes) -> None:
        """Bytes of a block as the pool holds it."""
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._pool[block, offset : offset + raw.numel()].copy_(raw)

    def step(self, block_tables: list[list[int]], exchange: Exchange) -> None:
        """This rank's part of one decode step: attends in every layer that sees everything, in their order. What fails
        here fails the step on all ranks, and nothing else."""
        first = FirstError()
        batch: DecodeBatch | None = None
        try:
            batch = self._batch(block_tables)
        except Exception as error:  # the exchanges must come nevertheless
            first.error = error
        dim = self._layout.head_dim
        for layer, rule in enumerate(self._rules):
            if not self._layout.layers[layer].head_bytes:
                continue
            query = torch.empty((len(block_tables), rule.query_heads, dim), dtype=rule.query_dtype, device=self._device)
            exchange.broadcast(query)
            exchange.gather(self._part(query, batch, layer, first))
        agree(exchange, first.error, WHAT)
        if first.error is not None:
            logger.warning("a decode step failed: %s", first.error)

    def _part(self, query: Tensor, batch: DecodeBatch | None, layer: int, first: FirstError) -> Tensor:
        if batch is None:
            return empty_part(query)
        rule = self._rules[layer]
        return first.guard(
            lambda: self._kernels.share_attention(query, batch, layer=layer, scale=rule.scale, softcap=rule.softcap),
            lambda: empty_part(query),
        )

    def swap_out(self, saved: int, prompt: list[int], own: list[list[int]]) -> None:
        self._saved[saved] = self._copy(prompt), [self._copy(blocks) for blocks in own]

    def swap_in(self, saved: int, prompt: list[int], own: list[list[int]], present: list[int]) -> None:
        """`present`: places in `prompt` of blocks that are in the pool already."""
        prompt_blocks, own_blocks = self._saved[saved]
        for i, block in enumerate(prompt):
            if i not in present:
                self._pool[block].copy_(prompt_blocks[i])
        for blocks, copies in zip(own, own_blocks, strict=True):
            for block, copy in zip(blocks, copies, strict=True):
                self._pool[block].copy_(copy)

    def drop_saved(self, saved: int) -> None:
        del self._saved[saved]

    def _copy(self, blocks: Sequence[int]) -> Tensor:
        index = torch.tensor(blocks, dtype=torch.long, device=self._device)
        return self._pool.index_select(0, index).cpu()

    def _batch(self, block_tables: list[list[int]]) -> DecodeBatch:
        width = max(1, *(len(row) for row in block_tables))
        tables = torch.tensor([row + [0] * (width - len(row)) for row in block_tables], dtype=torch.int32)
        zeros = torch.zeros(len(block_tables), dtype=torch.int32, device=self._device)
        return DecodeBatch(
            layout=self._layout,
            pool=self._pool,
            sinks=self._no_sinks,
            tails=self._no_tails,
            block_tables=tables.to(self._device),
            num_blocks=torch.tensor([len(row) for row in block_tables], dtype=torch.int32).to(self._device),
            slots=zeros,
            tail_lens=zeros,
        )
