"""One rank's part of a model, with its kernels: what every rank of a group builds alike, the only one included."""

from __future__ import annotations

import functools
import logging

from kvferry.deploy.layer_windows import layer_windows
from kvferry.deploy.model_config import ModelConfig, resolve_device, resolve_dtype
from kvferry.deploy.models import LoadedModel, find_model, load_model
from kvferry.deploy.numerics import rows_are_invariant
from kvferry.deploy.pass_width import widest_pass
from kvferry.deploy.ranks.collectives import Collectives
from kvferry.deploy.ranks.shard_model import shard_model
from kvferry.kernels.dispatch import Selection, select_kernels
from kvferry.kernels.forward import CausalModel
from kvferry.kernels.layout import BlockLayout
from kvferry.kernels.reference import ReferenceKernels
from kvferry.kernels.rotation import RotatedModel
from kvferry.kernels.shards import TensorParallel, shard_layout

logger = logging.getLogger(__name__)

INVARIANT_ROWS = 256
"""Row counts up to this one are tried at start; larger batches get a fixed row count."""


class RankModel:
    """Ranks make it at the same time: what it tries on the machine, they try and decide together."""

    def __init__(self, config: ModelConfig, team: Collectives) -> None:
        device = resolve_device(config.device)
        self.team = team
        self.loaded: LoadedModel = load_model(
            find_model(config.model),
            device=device,
            dtype=resolve_dtype(config.dtype, device),
            weight_quantization=config.weight_quantization,
            shard=functools.partial(shard_model, team=team),
        )
        team.meet()
        logger.info("weights: %s, %.1f MB", config.weight_quantization, self.loaded.weight_bytes / 1e6)
        model = self.loaded.model
        self.layout = BlockLayout(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            spec=config.spec,
        )
        """Of whole blocks."""
        self.group = TensorParallel(model.num_kv_heads, team.size)
        self.heads = self.group.heads(team.rank)
        self.shard_layout = shard_layout(self.layout, self.heads)
        """Of this rank's KV heads."""
        self.model: CausalModel = model
        rotated = config.spec.value_rotation != "none"
        if rotated:
            self.model = RotatedModel(model, device)
        self.selection: Selection = select_kernels(device, head_dim=model.head_dim, impl=config.kernels)
        slow = self.selection.kernels.name == ReferenceKernels.name
        logger.log(logging.WARNING if slow else logging.INFO, "%s", self.selection.reason)
        self.max_model_len = min(config.max_model_len or model.max_model_len, model.max_model_len)
        self.windows = layer_windows(self.model, max_model_len=self.max_model_len, device=device)
        self.rows_invariant = team.all_true(rows_are_invariant(model, rotated=rotated, max_rows=INVARIANT_ROWS))
        """Whether decode may pad a batch to any of its usual row counts without changing a bit."""
        self.pass_blocks = 1
        """Most blocks of a prefill pass."""
        if self.rows_invariant:
            block_size = self.layout.block_size
            self.pass_blocks = widest_pass(self.model, model, block_size=block_size, all_true=team.all_true)

    def share_of(self, kv_memory: int | float) -> int | float:
        """This rank's part of a worker's KV memory, in bytes or as a share of what is free. Ranks on GPUs have a device
        each, ranks on a CPU share its memory."""
        size = self.team.size
        if isinstance(kv_memory, int):
            return kv_memory // size
        return kv_memory if self.loaded.device.type == "cuda" else kv_memory / size
