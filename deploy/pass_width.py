"""How many blocks one prefill pass may cover on this machine without changing a bit of any of them.

A row of a matmul may depend on how many rows there are, and elementwise functions give an element other bits at the
end of a thread's share than inside it. Both are properties of the library, the chip and the number of threads, so every
width that prefill would use is tried at start.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvferry.deploy.causal_lm import TransformersModel
from kvferry.kernels.forward import CausalModel

MAX_PASS_BLOCKS = 4
"""A request that comes while a pass runs waits for its end, so it is not wider; 8 blocks were hardly faster than 4."""
DRAWS = 2


def widest_pass(
    model: CausalModel,
    loaded: TransformersModel,
    *,
    block_size: int,
    all_true: Callable[[bool], bool] = bool,
) -> int:
    """The largest of 1, 2, 4, ... `MAX_PASS_BLOCKS` blocks up to which every width gives every row the same bits.

    `all_true`: whether all ranks that run the model found so. Runs the first layer of `model`, and the activation
    functions of `loaded` that is inside it, on random rows.
    """
    device = loaded.device
    generator = torch.Generator().manual_seed(0)
    sizes = sorted({size for m in loaded.distinct_linears() for size in (m.in_features, m.out_features)})
    functions = [(function, size) for function in loaded.activations() for size in sizes if size < model.vocab_size]
    widest = 1
    while 2 * widest <= MAX_PASS_BLOCKS:
        rows = 2 * widest * block_size
        draws = [
            all_true(_layer_keeps_rows(model, rows, rows // 2, device, generator))
            and all_true(all(_keeps_rows(function, size, rows, loaded, generator) for function, size in functions))
            for _ in range(DRAWS)
        ]
        if not all(draws):
            break
        widest *= 2
    return widest


class _FirstLayer(Exception):
    """Ends a forward pass: the rest is not needed."""


class _Probe:
    """`AttentionStep` that answers layer 0 with a function of each row, and keeps what layer 1 asks."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

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
        self.rows = [x.clone() for x in (query, key, value)]
        if layer > 0:
            raise _FirstLayer
        return query + value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def _layer_rows(model: CausalModel, token_ids: Tensor, positions: Tensor) -> list[Tensor]:
    """Query, key and value of layer 1, or of a model with one layer its final hidden states."""
    probe = _Probe()
    try:
        return [model.hidden(token_ids, positions, probe)]
    except _FirstLayer:
        return probe.rows


def _layer_keeps_rows(
    model: CausalModel, rows: int, part: int, device: torch.device, generator: torch.Generator
) -> bool:
    token_ids = torch.randint(model.vocab_size, (rows,), generator=generator).to(device)
    begin = int(torch.randint(max(model.max_model_len - rows, 1), (1,), generator=generator))
    positions = torch.arange(begin, begin + rows, device=device)
    whole = _layer_rows(model, token_ids, positions)
    pieces = [_layer_rows(model, token_ids[i : i + part], positions[i : i + part]) for i in range(0, rows, part)]
    return all(torch.equal(x, torch.cat(parts)) for x, parts in zip(whole, zip(*pieces, strict=True), strict=True))


@torch.inference_mode()
def _keeps_rows(
    function: torch.nn.Module, columns: int, rows: int, loaded: TransformersModel, generator: torch.Generator
) -> bool:
    """`function` is elementwise; few of its elements can differ, so it gets more of them than a layer has."""
    x = (4 * torch.randn(rows, columns, generator=generator)).to(loaded.device, loaded.dtype)
    halves = [function(x[: rows // 2]), function(x[rows // 2 :])]
    return torch.equal(function(x), torch.cat(halves))
