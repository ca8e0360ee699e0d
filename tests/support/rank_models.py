"""Tiny models that several ranks can share."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvferry.deploy.models import find_model, load_tokenizer


def save_model(family: str, folder: Path) -> Path:
    """Random weights (fixed seed), 8 query heads, 4 KV heads, tied embeddings, and the demo model's tokenizer."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            family,
            hidden_size=192,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            vocab_size=49152,
            max_position_embeddings=2048,
            initializer_range=0.15,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    load_tokenizer(find_model("demo")).save_pretrained(folder)
    return folder
