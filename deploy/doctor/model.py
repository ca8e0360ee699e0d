"""The model of the settings: found, readable, supported; and how many tokens the block pool holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kvferry.deploy.doctor.finding import Finding, gib, problem, warning
from kvferry.deploy.kv_memory import plan_kv_memory
from kvferry.deploy.settings import Settings
from kvferry.deploy.spec_file import resolve_spec
from kvferry.kernels.layout import BlockLayout

LARGEST_HASHED = 2 << 30
"""A GGUF file over this size is not read to see whether its conversion is there."""


def model_findings(settings: Settings) -> Iterator[Finding]:
    """Loads nothing, and asks no hub."""
    from kvferry.deploy.causal_lm import UnsupportedModel
    from kvferry.deploy.models import DEMO_MODEL, demo_gguf, find_model, gguf_folder

    topic = f"model {settings.model}"
    path = Path(settings.model).expanduser()
    try:
        if settings.model == DEMO_MODEL:
            path = demo_gguf()
        if path.suffix == ".gguf":
            if not os.access(path, os.R_OK):
                yield problem(topic, "there is no such file, or it cannot be read", "correct model: in the settings")
                return
            folder = gguf_folder(path) if path.stat().st_size <= LARGEST_HASHED else None
            if folder is None or not (folder / "config.json").is_file():
                yield Finding(topic, f"found, {gib(path.stat().st_size)}", "the first start converts it, once")
                return
            where = str(folder)
        else:
            where = find_model(settings.model).path
    except UnsupportedModel as error:
        yield problem(topic, "not found", f"{error}")
        return
    yield from _folder(settings, topic, where)


def _folder(settings: Settings, topic: str, where: str) -> Iterator[Finding]:
    from transformers import AutoConfig

    from kvferry.deploy.causal_lm import UnsupportedModel, check_supported
    from kvferry.deploy.weight_quantization import check_not_quantized

    try:
        config = AutoConfig.from_pretrained(where, local_files_only=True)
    except (OSError, ValueError) as error:
        if not Path(where).is_dir():
            reason = "the first start downloads it: check the network, or give a folder"
            yield warning(topic, "not on this machine", reason)
        else:
            yield problem(
                topic, "its config.json cannot be used", f"{type(error).__name__}: give a complete model folder"
            )
        return
    try:
        check_supported(config)
        check_not_quantized(config)
    except UnsupportedModel as error:
        yield problem(topic, f"family {config.model_type}", f"{error}")
        return
    if Path(where).is_dir():
        missing, num_bytes = _weights(Path(where))
        if missing:
            yield problem(topic, f"{missing} is missing or cannot be read", "copy the whole model folder again")
            return
        yield Finding(topic, f"{config.model_type}, {gib(num_bytes)} of weights")
    else:
        yield Finding(topic, f"{config.model_type}, in the hub's cache")
    yield from _capacity(settings, config)


def _weights(folder: Path) -> tuple[str, int]:
    """The first weight file that cannot be read, empty if all can; and their size."""
    index = folder / "model.safetensors.index.json"
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError):
            return index.name, 0
    if not names:
        return "a .safetensors file", 0
    for name in names:
        if not os.access(folder / name, os.R_OK):
            return name, 0
    return "", sum((folder / name).stat().st_size for name in names)


def _capacity(settings: Settings, config: Any) -> Iterator[Finding]:
    topic = "KV capacity"
    device = torch.device("cuda" if settings.device == "auto" and torch.cuda.is_available() else "cpu")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = config.max_position_embeddings
    max_model_len = min(settings.max_model_len or window, window)
    try:
        layout = BlockLayout(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            spec=resolve_spec(settings.preset, block_size=settings.block_size, sink_tokens=settings.sink_tokens),
        )
        # Layers with a window would leave more room: this is the least.
        plan = plan_kv_memory(
            settings.decode.kv_memory,
            layout,
            device,
            windows=[None] * config.num_hidden_layers,
            num_slots=settings.decode.max_num_seqs,
            max_model_len=max_model_len,
        )
    except (OSError, ValueError) as error:
        yield problem(topic, "no plan", str(error))
        return
    tokens = plan.num_blocks * layout.block_size
    value = f"{tokens:,} tokens in {gib(plan.num_bytes)} of each decode worker"
    if tokens < max_model_len:
        reason = f"one request of {max_model_len:,} tokens does not fit: more decode.kv_memory, or set max_model_len"
        yield warning(topic, value, reason)
    else:
        requests = f"{tokens / max_model_len:.1f} requests of {max_model_len:,} tokens"
        yield Finding(topic, value, f"computed, not loaded: {requests} at once")
