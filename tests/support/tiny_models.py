"""Tiny models with random weights, one for each supported family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from kvferry.deploy.causal_lm import SUPPORTED_FAMILIES
from kvferry.deploy.models import find_model, load_tokenizer

VOCAB_SIZE = 49152


def write_tiny_model(family: str, folder: Path) -> None:
    """The same weights each time, and the demo model's tokenizer."""
    torch.manual_seed(SUPPORTED_FAMILIES.index(family))
    model = AutoModelForCausalLM.from_config(_config(family))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    load_tokenizer(find_model("demo")).save_pretrained(folder)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids that do not repeat in a short period."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCAB_SIZE, (length,), generator=generator).tolist()


def _config(family: str) -> PretrainedConfig:
    shape: dict[str, Any] = {
        "hidden_size": 192,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 2048,
        "initializer_range": 0.15,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    # Windows end inside a block, so that sinks, packed pages and the tail are all cut by one.
    if family == "mistral":
        shape |= {"sliding_window": 75}
    elif family == "gemma":
        shape |= {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"}
    elif family == "gemma2":
        shape |= {"sliding_window": 75, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0}
    elif family == "gemma3_text":
        shape |= {"sliding_window": 75, "sliding_window_pattern": 2, "query_pre_attn_scalar": 64}
    if family.startswith("gemma"):
        # Embeddings are scaled up: tied ones would make the model repeat its last token.
        shape |= {"tie_word_embeddings": False}
    return AutoConfig.for_model(family, **shape)
