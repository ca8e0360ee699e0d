"""Quantizes a loaded model's linear layers, and counts what weights take."""

from __future__ import annotations

from typing import get_args

import torch
from torch import nn
from transformers import PretrainedConfig

from kvferry.deploy.causal_lm import UnsupportedModel
from kvferry.deploy.int8_linear import Int8Linear, sums_are_exact
from kvferry.deploy.prepacked_linear import PrepackedLinear
from kvferry.deploy.weight_quantization_names import WeightQuantization

NAMES = get_args(WeightQuantization)


def check_not_quantized(config: PretrainedConfig) -> None:
    """Raises UnsupportedModel for a checkpoint whose weights are quantized already."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method", "unknown") if isinstance(found, dict) else getattr(found, "quant_method", found)
    raise UnsupportedModel(
        f"the checkpoint's weights are quantized already ({method}): give an unquantized one; "
        "weight_quantization: int8 quantizes it while loading"
    )


def quantize_weights(model: nn.Module, name: str, device: torch.device) -> None:
    """Replaces linear layers in place; "none" leaves all. The output layer is one of them, the embedding is not.

    Raises ValueError for another name, UnsupportedModel where int8 cannot run.
    """
    if name not in NAMES:
        raise ValueError(f"weight_quantization {name!r} is not one of {', '.join(NAMES)}")
    if name == "none":
        return
    if device.type != "cpu":
        raise UnsupportedModel(f"int8 weights run on a CPU only, not on {device}: set weight_quantization to none")
    if not sums_are_exact():
        raise UnsupportedModel(
            "this CPU's int8 matmul saturates (int8 weights need VNNI): set weight_quantization to none"
        )
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Int8Linear(module))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights in memory. A tied output layer that is packed is a copy, and counts."""
    packed = [m for m in model.modules() if isinstance(m, Int8Linear | PrepackedLinear)]
    inside = {id(b) for m in packed for b in m.buffers()}
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in inside}
    return sum(tensors.values()) + sum(m.num_bytes for m in packed)
