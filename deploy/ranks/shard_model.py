"""Cuts a loaded transformers model down to one rank's shard, along the model's own tensor-parallel plan.

transformers can apply the plan itself while it loads. kvferry does not let it: it refuses more ranks than KV heads, its
all-reduce makes a row's bits depend on the number of rows, and its DTensors cannot be laid out for the matmul.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kvferry.deploy.causal_lm import UnsupportedModel
from kvferry.deploy.ranks.collectives import Collectives
from kvferry.kernels.shards import TensorParallel

WHOLE = ("replicated_with_grad_allreduce", "replicate", "embedding_rowwise")
"""Styles of modules that every rank keeps. An embedding is a look-up: cutting it would cost a sum over ranks."""


class RowwiseLinear(nn.Module):
    """Holds columns of a weight; its input is the rank's share of features. The sum over ranks is the output."""

    def __init__(self, linear: nn.Linear, columns: range, team: Collectives) -> None:
        super().__init__()
        self.linear = _linear(linear.weight[:, columns.start : columns.stop], None)
        self.bias: Tensor | None
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self._team = team

    def forward(self, x: Tensor) -> Tensor:
        """x [..., columns] -> [..., out_features], the same on every rank."""
        out = self._team.sum(self.linear(x))
        return out if self.bias is None else out + self.bias


class GatheredLinear(nn.Module):
    """Holds rows of a weight, as many on each rank; every rank gets the whole output."""

    def __init__(self, linear: nn.Linear, team: Collectives) -> None:
        super().__init__()
        self._num_outputs = linear.out_features
        self._team = team
        count = -(-linear.out_features // team.size)
        rows = slice(team.rank * count, (team.rank + 1) * count)
        bias = None if linear.bias is None else _padded(linear.bias[rows], count)
        self.linear = _linear(_padded(linear.weight[rows], count), bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], the same on every rank."""
        return self._team.concatenate(self.linear(x))[..., : self._num_outputs]


def check_group_size(config: PretrainedConfig, size: int) -> None:
    """Raises ValueError when `size` ranks cannot share this model evenly."""
    try:
        TensorParallel(config.num_key_value_heads, size)
    except ValueError as error:
        raise ValueError(f"tensor_parallel: {error}") from None
    if config.num_attention_heads % size:
        raise ValueError(
            f"tensor_parallel: {size} ranks cannot share {config.num_attention_heads} query heads evenly; "
            "take a divisor of that number"
        )


def shard_model(model: PreTrainedModel, team: Collectives) -> None:
    """Replaces linear layers in place. Raises UnsupportedModel for a plan that is not known here, ValueError for a size
    that does not fit."""
    if team.size == 1:
        return
    config = model.config
    check_group_size(config, team.size)
    heads = TensorParallel(config.num_key_value_heads, team.size).heads(team.rank)
    plan = model.tp_plan
    unused = {name for name, style in plan.items() if style not in WHOLE}
    for path, module in list(model.named_modules()):
        name = re.sub(r"\d+", "*", path)
        style = plan.get(name)
        if style is None or style in WHOLE:
            continue
        if not isinstance(module, nn.Linear):
            raise UnsupportedModel(f"{path} of the model's tensor-parallel plan is no linear layer")
        unused.discard(name)
        parent, _, leaf = path.rpartition(".")
        head_dim = module.out_features // config.num_key_value_heads if leaf in ("k_proj", "v_proj") else 0
        setattr(model.get_submodule(parent), leaf, _shard(module, style, team, heads, head_dim))
    if unused or not plan:
        raise UnsupportedModel(f"the model's tensor-parallel plan does not fit it: {sorted(unused) or 'it has none'}")


def _shard(linear: nn.Linear, style: str, team: Collectives, heads: range, head_dim: int) -> nn.Module:
    """`head_dim`: of a layer whose outputs are KV heads, else 0."""
    match style:
        case "colwise":
            if head_dim:
                rows = range(heads.start * head_dim, heads.stop * head_dim)
            else:
                rows = _share(linear.out_features, team)
            bias = None if linear.bias is None else linear.bias[rows.start : rows.stop]
            return _linear(linear.weight[rows.start : rows.stop], bias)
        case "rowwise":
            return RowwiseLinear(linear, _share(linear.in_features, team), team)
        case "colwise_gather_output" | "colwise_rep":
            return GatheredLinear(linear, team)
    raise UnsupportedModel(f"the model's tensor-parallel plan has a style that is not known: {style!r}")


def _share(features: int, team: Collectives) -> range:
    return range(features * team.rank // team.size, features * (team.rank + 1) // team.size)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """With copies, so that the whole weight can go."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def _padded(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x.new_zeros((rows - x.shape[0], *x.shape[1:]))])
