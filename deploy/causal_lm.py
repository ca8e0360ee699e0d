"""A transformers model behind the `CausalModel` seam.

The model's own forward runs unchanged; only its attention is replaced, through transformers' attention interface.
The attention function finds the current `AttentionStep` in the keyword arguments of the forward call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from kvferry.deploy.row_invariance import Linear, distinct_linears
from kvferry.kernels.forward import AttentionStep

ATTENTION_NAME = "kvferry_packed"
SUPPORTED_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text")
LAYER_TYPES = ("full_attention", "sliding_attention")
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class UnsupportedModel(ValueError):
    """The model's family or shape is not one that kvferry serves."""


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    kv_step: AttentionStep,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,  # transformers passes options of other implementations
) -> tuple[Tensor, None]:
    """query [1, Hq, n, D], key, value [1, H, n, D] -> [1, n, Hq, D]."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    out = kv_step.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, _attention)


def check_supported(config: PretrainedConfig) -> None:
    """Raises UnsupportedModel, naming what is not supported and what is."""
    family = config.model_type
    if family not in SUPPORTED_FAMILIES:
        raise UnsupportedModel(
            f"model family {family!r} is not supported; kvferry serves {', '.join(SUPPORTED_FAMILIES)}"
        )
    for rope_type in _rope_types(config):
        if rope_type not in STATIC_ROPE_TYPES:
            # Their rotation depends on the longest position in a forward pass, so on a request's company in the batch.
            raise UnsupportedModel(
                f"rope type {rope_type!r} is not supported; kvferry serves {', '.join(STATIC_ROPE_TYPES)}"
            )
    unknown = sorted(set(getattr(config, "layer_types", None) or []) - set(LAYER_TYPES))
    if unknown:
        raise UnsupportedModel(f"layers of kind {unknown} are not supported; kvferry serves {', '.join(LAYER_TYPES)}")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModel("attention to later tokens is not supported: the model must be causal")


def _rope_types(config: PretrainedConfig) -> set[str]:
    """One for the model, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = [value for value in rope.values() if isinstance(value, dict)]
    return {parameters.get("rope_type", "default") for parameters in by_kind or [rope]}


class TransformersModel:
    """`CausalModel` over a loaded transformers model. Sets the model's attention implementation."""

    def __init__(self, model: PreTrainedModel) -> None:
        check_supported(model.config)
        model.set_attn_implementation(ATTENTION_NAME)
        self._model = model.eval()
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        config = model.config
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.vocab_size: int = config.vocab_size
        self.max_model_len: int = config.max_position_embeddings
        self.hidden_size: int = config.hidden_size
        self._logit_softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def distinct_linears(self) -> list[Linear]:
        """One linear layer of each shape that a forward pass uses."""
        return distinct_linears(self._model)

    def activations(self) -> list[torch.nn.Module]:
        """The activation functions of its feed-forward layers, one of each class."""
        found = [m.act_fn for m in self._model.modules() if isinstance(getattr(m, "act_fn", None), torch.nn.Module)]
        return list({type(function): function for function in found}.values())

    @torch.inference_mode()
    def hidden(self, token_ids: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        out = self._model.model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            kv_step=step,
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.lm_head(hidden).float()
        if self._logit_softcap is not None:
            logits = torch.tanh(logits / self._logit_softcap) * self._logit_softcap
        return logits
