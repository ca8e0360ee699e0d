"""Fingerprints: what changes a digest of a model, a tokenizer or a worker, and what does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from kvferry.deploy.causal_lm import UnsupportedModel
from kvferry.deploy.models import end_token_ids, find_model, load_model, load_tokenizer, tokenizer_digest
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime
from kvferry.kernels.spec import KVQuantSpec
from kvferry.proto import worker_pb2

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 20,000 weights, without a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=100,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    def make(source: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(source, tmp_path / name))

    return make


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def weights(folder: Path, dtype: torch.dtype = torch.float32) -> bytes:
    return load_model(find_model(str(folder)), device=CPU, dtype=dtype).weights_digest


# --- weights -----------------------------------------------------------------------------------------------------


def test_equal_models_have_equal_digests(folder: Path, copy: Callable[..., Path]) -> None:
    """Also under another name, in another folder, and cut into several files."""
    digest = weights(folder)
    assert len(digest) == 32
    other = copy(folder, "another-name")
    assert find_model(str(other)).name == "another-name"
    assert weights(folder) == weights(other) == digest
    edit_json(other / "config.json", lambda c: c.update(_name_or_path="somewhere/else", transformers_version="4.0.0"))
    assert weights(other) == digest
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(copy(folder, "sharded"), max_shard_size="40KB")
    (other.parent / "sharded" / "model.safetensors").unlink()
    assert len(list((other.parent / "sharded").glob("*.safetensors"))) > 1
    assert weights(other.parent / "sharded") == digest


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"],
)
def test_one_flipped_weight(folder: Path, copy: Callable[..., Path], name: str) -> None:
    """The lowest bit of the last value of a tensor."""
    other = copy(folder)

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1).view(torch.int32)[-1] ^= 1

    edit_weights(other, flip)
    assert weights(other) != weights(folder)


def test_swapped_tensors(folder: Path, copy: Callable[..., Path]) -> None:
    """The same bytes under other names are another model."""
    other = copy(folder)

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        one, two = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
        tensors[one], tensors[two] = tensors[two], tensors[one]

    edit_weights(other, swap)
    assert weights(other) != weights(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["rope_parameters"].update(rope_theta=c["rope_parameters"]["rope_theta"] * 2),
        lambda c: c.update(rms_norm_eps=1e-5),
        lambda c: c.update(hidden_act="gelu"),
        lambda c: c.update(max_position_embeddings=512),
    ],
    ids=["rope theta", "norm eps", "activation", "window"],
)
def test_the_configuration_counts(
    folder: Path, copy: Callable[..., Path], change: Callable[[dict[str, Any]], object]
) -> None:
    other = copy(folder)
    edit_json(other / "config.json", change)
    assert weights(other) != weights(folder)


def test_the_dtype_as_loaded_counts(folder: Path) -> None:
    assert weights(folder, torch.bfloat16) != weights(folder, torch.float32)


# --- tokenizer ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer(find_model("demo")).save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


def tokens(folder: Path) -> bytes:
    return tokenizer_digest(load_tokenizer(find_model(str(folder))))


def test_equal_tokenizers_have_equal_digests(tokenizer_folder: Path, copy: Callable[..., Path]) -> None:
    digest = tokens(tokenizer_folder)
    assert len(digest) == 32
    assert tokens(tokenizer_folder) == tokens(copy(tokenizer_folder, "another-name")) == digest
    # What was saved and read again is the tokenizer that it was made from.
    assert tokenizer_digest(load_tokenizer(find_model("demo"))) == digest


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model"]["merges"].pop(),
        lambda t: t["model"]["merges"].insert(0, t["model"]["merges"].pop()),
        lambda t: t["added_tokens"][-1].update(lstrip=True),
    ],
    ids=["one merge less", "a merge of another rank", "a special token"],
)
def test_one_change_in_the_tokenizer(
    tokenizer_folder: Path, copy: Callable[..., Path], change: Callable[[dict[str, Any]], object]
) -> None:
    other = copy(tokenizer_folder)
    edit_json(other / "tokenizer.json", change)
    assert tokens(other) != tokens(tokenizer_folder)


def test_the_chat_template_counts(tokenizer_folder: Path, copy: Callable[..., Path]) -> None:
    other = copy(tokenizer_folder)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert tokens(other) != tokens(tokenizer_folder)
    template.unlink()
    assert load_tokenizer(find_model(str(other))).chat_template is None
    assert tokens(other) != tokens(tokenizer_folder)


# --- the whole identity ------------------------------------------------------------------------------------------


@pytest.fixture
def load(folder: Path, tokenizer_folder: Path, tmp_path: Path) -> Iterator[Callable[..., ModelRuntime]]:
    """A runtime of the small model, loaded anew; `change` edits its folder."""
    runtimes: list[ModelRuntime] = []

    def start(change: Callable[[Path], object] | None = None, sink_tokens: int = 4, **options: Any) -> ModelRuntime:
        path = Path(shutil.copytree(folder, tmp_path / f"model-{len(runtimes)}"))
        for each in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tokenizer_folder / each, path)
        if change is not None:
            change(path)
        spec = KVQuantSpec(block_size=32, sink_tokens=sink_tokens)
        runtimes.append(ModelRuntime(ModelConfig(model=str(path), spec=spec, **{"dtype": "float32", **options})))
        return runtimes[-1]

    yield start
    for runtime in runtimes:
        runtime.engine.close()


def differing(one: worker_pb2.ModelIdentity, other: worker_pb2.ModelIdentity) -> set[str]:
    names = [field.name for field in worker_pb2.ModelIdentity.DESCRIPTOR.fields]
    return {name for name in names if getattr(one, name) != getattr(other, name)}


def test_loading_twice_gives_one_identity(load: Callable[..., ModelRuntime]) -> None:
    identity = load().identity
    assert load().identity == identity
    assert identity.layout_version > 0
    digests = (identity.weights_digest, identity.tokenizer_digest, identity.spec_digest, identity.numerics_class)
    assert [len(digest) for digest in digests] == [32] * 4
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # The numerics class holds a probe of packed bytes, so it follows whatever changes them.
        ({"sink_tokens": 0}, {"spec_digest", "numerics_class"}),
        ({"kernels": "reference"}, {"numerics_class"}),
        ({"dtype": "bfloat16"}, {"weights_digest", "numerics_class"}),  # the weights as loaded
        ({"max_model_len": 100}, set()),
    ],
    ids=["spec", "kernels", "dtype", "window"],
)
def test_an_option_changes_its_fields(
    load: Callable[..., ModelRuntime], options: dict[str, Any], expected: set[str]
) -> None:
    default = load()
    if options.get("kernels") == default.selection.kernels.name:
        pytest.skip("this machine has only the reference kernels")
    assert differing(default.identity, load(**options).identity) == expected


def test_a_chat_template_changes_only_the_tokenizer_digest(load: Callable[..., ModelRuntime]) -> None:
    other = load(lambda path: (path / "chat_template.jinja").write_text("{{ messages }}"))
    assert differing(load().identity, other.identity) == {"tokenizer_digest"}


def test_the_probe_sees_a_changed_weight(load: Callable[..., ModelRuntime]) -> None:
    def scale(path: Path) -> None:
        edit_weights(path, lambda tensors: tensors["model.layers.0.self_attn.k_proj.weight"].mul_(1.5))

    assert differing(load().identity, load(scale).identity) == {"weights_digest", "numerics_class"}


def test_info_repeats_the_identity_and_the_layout(load: Callable[..., ModelRuntime]) -> None:
    runtime = load(max_model_len=100)
    info = runtime.info(roles=["decode"], pool_blocks=7)
    assert info.identity == runtime.identity
    assert (list(info.roles), info.pool_blocks, info.max_model_len, info.block_size) == (["decode"], 7, 100, 32)
    assert info.block_bytes == 2 * 1 * 24 * 32  # layers, heads, page of 32 tokens
    assert info.kv_bytes_per_token_bf16 == 2 * 1 * 32 * 2 * 2
    assert load(max_model_len=10**6).info(roles=["prefill"]).max_model_len == 256


# --- what is found and what is refused ---------------------------------------------------------------------------


def test_find_model(folder: Path, tmp_path: Path) -> None:
    assert find_model(str(folder)).path == str(folder)
    assert find_model("owner/name") == type(find_model(str(folder)))("owner/name", "owner/name")
    for reference, message in {
        str(tmp_path / "missing.gguf"): "there is no file",
        str(tmp_path): "has no config.json",
        "nonsense": "no model 'nonsense'",
        "./not/there": "no model './not/there'",
        "a/b/c": "no model 'a/b/c'",
    }.items():
        with pytest.raises(UnsupportedModel, match=message):
            find_model(reference)


def test_another_family_is_refused_by_name(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="'gpt2' is not supported; kvferry serves llama, qwen2, qwen3"):
        load_model(find_model(str(tmp_path)), device=CPU, dtype=torch.float32)


def test_weights_that_could_run_code_are_not_loaded(folder: Path, copy: Callable[..., Path]) -> None:
    other = copy(folder)
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_model(find_model(str(other)), device=CPU, dtype=torch.float32)


def test_end_tokens_come_from_all_three_places(folder: Path, tokenizer_folder: Path, copy: Callable[..., Path]) -> None:
    path = copy(folder)
    tokenizer = load_tokenizer(find_model(str(tokenizer_folder)))
    assert tokenizer.eos_token_id == 2
    edit_json(path / "config.json", lambda c: c.update(eos_token_id=11))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [12, 2]}))
    assert end_token_ids(find_model(str(path)), tokenizer) == [2, 11, 12]
    (path / "generation_config.json").unlink()
    edit_json(path / "config.json", lambda c: c.update(eos_token_id=[13, 14]))
    assert end_token_ids(find_model(str(path)), tokenizer) == [2, 13, 14]
