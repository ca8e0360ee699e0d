"""Each family against plain transformers with an unquantized cache, and against the reference kernels.

While a prompt and its answer fit one block nothing is quantized: K and V are only rounded to fp16 (relative error
2^-11), so logits agree with plain transformers to a small tolerance, and greedy tokens agree exactly with transformers
on rounded K and V. Beyond a block the kernels that run here must agree with the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from kvferry.deploy.causal_lm import SUPPORTED_FAMILIES, UnsupportedModel, check_supported
from kvferry.deploy.models import find_model
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime
from kvferry.kernels.forward import AttentionStep
from kvferry.kernels.packed import PackedKernels
from kvferry.kernels.reference import ReferenceKernels
from kvferry.prefill.chunk_step import ChunkStep
from kvferry.prefill.prompt_blocks import LocalPromptBlocks

FP16_TOLERANCE = 1e-2
"""RMS error over RMS of the logits: what rounding K and V to fp16 may change in these random models, whose attention
scores are large."""
EXACT_TOLERANCE = 2e-3
"""Largest error over RMS: sums in another order, nothing else."""
KERNEL_TOLERANCE = 2e-2
"""Of logits, between two implementations: sums in another order, and now and then another code at a tie."""


ROUNDED_ATTENTION = "test_rounded_kv"


def _rounded_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    groups, n, length = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = (x.half().float().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * kwargs["scaling"]
    softcap, window = kwargs.get("softcap"), kwargs.get("sliding_window") or length
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    past = length - n
    seen = torch.ones(n, length, dtype=torch.bool).tril(past).triu(past + 1 - window)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register(ROUNDED_ATTENTION, _rounded_attention)


def rms(x: torch.Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


def prefill_logits(runtime: ModelRuntime, kernels: PackedKernels, token_ids: list[int]) -> torch.Tensor:
    """Logits of every position, chunk by chunk as the engine does it: [n, vocab_size]."""
    device = torch.device("cpu")
    blocks = LocalPromptBlocks(runtime.layout, len(token_ids), device)
    rows = []
    for index in range(blocks.num_blocks + bool(blocks.tail_len)):
        begin = index * runtime.layout.block_size
        end = min(begin + runtime.layout.block_size, len(token_ids))
        step: AttentionStep = ChunkStep(blocks, index, end - begin, kernels)
        hidden = runtime.model.hidden(torch.tensor(token_ids[begin:end]), torch.arange(begin, end), step)
        rows.append(runtime.model.logits(hidden))
    return torch.cat(rows)


@pytest.fixture(scope="module")
def plain(tiny_model: Callable[[str], Path]) -> Callable[[str], Any]:
    def load(family: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32).eval()

    return load


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_logits_without_quantization(
    family: str, load_runtime: Callable[..., ModelRuntime], plain: Callable[[str], Any], make_prompt: Any
) -> None:
    runtime = load_runtime(family, block_size=512)
    token_ids = make_prompt(300)
    ours = prefill_logits(runtime, runtime.selection.kernels, token_ids)
    with torch.inference_mode():
        theirs = plain(family)(torch.tensor([token_ids]), use_cache=False).logits[0]
    assert theirs.std() > 0.5  # logits that are all alike would prove nothing
    assert rms(ours - theirs) < FP16_TOLERANCE * rms(theirs)
    # The same model with K and V rounded to fp16 and nothing else changed agrees much more closely.
    with torch.inference_mode():
        rounded = plain(family)
        rounded.set_attn_implementation(ROUNDED_ATTENTION)
        theirs = rounded(torch.tensor([token_ids]), use_cache=False).logits[0]
    assert (ours - theirs).abs().max() < EXACT_TOLERANCE * rms(theirs)
    runtime.engine.close()


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
async def test_greedy_tokens_without_quantization(
    family: str,
    load_runtime: Callable[..., ModelRuntime],
    serve_workers: Any,
    plain: Callable[[str], Any],
    make_prompt: Any,
) -> None:
    runtime = load_runtime(family, block_size=512)
    token_ids = make_prompt(90)
    answer = await (await serve_workers(runtime)).generate(token_ids, max_tokens=24)
    rounded = plain(family)
    rounded.set_attn_implementation(ROUNDED_ATTENTION)  # random models have near ties
    theirs = rounded.generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(token_ids) :].tolist()
    assert len(set(theirs)) > 4
    assert answer.tokens == theirs
    runtime.engine.close()


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_logits_over_packed_blocks_agree_with_the_reference(
    family: str, runtime: Callable[[str], ModelRuntime], make_prompt: Any
) -> None:
    worker = runtime(family)
    token_ids = make_prompt(150)
    ours = prefill_logits(worker, worker.selection.kernels, token_ids)
    reference = prefill_logits(worker, ReferenceKernels(), token_ids)
    assert worker.selection.kernels.name != ReferenceKernels.name
    error = (ours - reference).abs().mean() / reference.std()
    assert error < KERNEL_TOLERANCE


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_packed_blocks_change_the_logits(
    family: str, runtime: Callable[[str], ModelRuntime], plain: Callable[[str], Any], make_prompt: Any
) -> None:
    """The control of the tests above: with packed blocks logits do differ from plain transformers, but not wildly."""
    worker = runtime(family)
    token_ids = make_prompt(150)
    ours = prefill_logits(worker, worker.selection.kernels, token_ids)
    with torch.inference_mode():
        theirs = plain(family)(torch.tensor([token_ids]), use_cache=False).logits[0]
    error = (ours - theirs).abs().mean(-1) / theirs.std()
    assert error[:32].max() < FP16_TOLERANCE  # the first block attends to itself only, in fp16
    assert 10 * KERNEL_TOLERANCE < error[64:].mean() * 10 < 10.0


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import BloomConfig, GPT2Config

    for config in (GPT2Config(), BloomConfig()):
        config.save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModel, match=config.model_type):
            ModelRuntime(ModelConfig(model=str(tmp_path)))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_ropes_that_depend_on_the_company_are_refused(rope_type: str) -> None:
    """Their rotation changes with the longest position in a forward pass, which other requests decide."""
    from transformers import LlamaConfig

    config = LlamaConfig()
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModel, match=rope_type):
        check_supported(config)


def test_layers_of_another_kind_are_refused() -> None:
    from transformers import LlamaConfig, Qwen2Config

    config = Qwen2Config(num_hidden_layers=2, layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(UnsupportedModel, match="chunked_attention"):
        check_supported(config)
    bidirectional = LlamaConfig()
    bidirectional.use_bidirectional_attention = True
    with pytest.raises(UnsupportedModel, match="causal"):
        check_supported(bidirectional)


@pytest.mark.parametrize("reference", ["no-such-folder", "/nowhere/model.gguf", "a/b/c"])
def test_models_that_are_not_there(reference: str) -> None:
    with pytest.raises(UnsupportedModel):
        find_model(reference)
