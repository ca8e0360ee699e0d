"""Prefill by a group: what it packs against one rank, and against itself whatever was cached."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from kvferry.deploy.ranks.payloads import take
from kvferry.deploy.ranks.prefill import GroupPrompt
from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kernels.sampling import SampledToken, SamplingParams
from kvferry.kernels.shards import shard_ranges
from kvferry.prefill.executor import PrefillPass
from kvferry.prefill.job import PrefillJob
from kvferry.prefill.prompt_blocks import PromptBlocks

LIMIT_S = 120.0
GROUPS = [
    ("llama", 2),
    *(pytest.param(*group, marks=pytest.mark.deep) for group in (("llama", 8), ("qwen2", 4), ("qwen3", 2))),
]
TOLERANCE = 2e-3
"""Largest difference of a logit from one rank's, as a share of the largest logit: fp32 sums in another order, with K
and V rounded to fp16 on the way."""

Group = Callable[..., ModelRuntime]


def payloads(blocks: PromptBlocks) -> list[bytes]:
    return [bytes(blocks.payload(index)) for index in range(blocks.num_blocks)]


def compute(runtime: ModelRuntime, token_ids: list[int], cached: list[bytes]) -> tuple[PromptBlocks, int]:
    """With the first blocks loaded as if they came from the store."""
    blocks = runtime.engine.new_blocks(len(token_ids))
    for index, payload in enumerate(cached):
        blocks.load(index, torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    done: Future[list[SampledToken]] = Future()
    job = PrefillJob(
        token_ids=token_ids,
        sampling=SamplingParams(),
        blocks=blocks,
        on_block=lambda index: None,
        on_done=done.set_result,
        on_error=done.set_exception,
    )
    runtime.engine.submit(job)
    return blocks, done.result(LIMIT_S)[0].token_id


@pytest.mark.parametrize(("family", "size"), GROUPS)
def test_logits_are_those_of_one_rank(family: str, size: int, group: Group, make_prompt: Any) -> None:
    """Of a prompt shorter than a block: nothing is quantized on the way."""
    token_ids = make_prompt(20)
    work = PrefillPass(index=0, begin=0, token_ids=token_ids, wants_logits=True)
    logits = []
    for runtime in (group(1, family), group(size, family)):
        executor = runtime.executors.prefill()
        layers: list[int] = []
        logits.append(executor.run(executor.new_blocks(len(token_ids)), work, layers.append))
        assert layers == [0, 1, 2]
    one, several = logits
    assert one is not None and several is not None and one.shape == several.shape
    assert float((one - several).abs().max()) <= TOLERANCE * float(one.abs().max())


@pytest.mark.parametrize(("family", "size"), GROUPS)
def test_blocks_lie_where_one_rank_puts_them(family: str, size: int, group: Group, make_prompt: Any) -> None:
    """Codes at a rounding boundary may differ; a head in another's place would leave few bytes equal."""
    token_ids = make_prompt(150)
    one, token = compute(group(1, family), token_ids, [])
    several, same_token = compute(group(size, family), token_ids, [])
    assert token == same_token
    layout = group(1, family).layout
    for index, (whole, theirs) in enumerate(zip(payloads(one), payloads(several), strict=True)):
        assert len(whole) == len(theirs) == layout.payload_bytes(index)
        head_bytes = len(whole) // (layout.num_layers * layout.num_kv_heads)
        for begin in range(0, len(whole), head_bytes):
            pairs = list(zip(whole[begin : begin + head_bytes], theirs[begin : begin + head_bytes], strict=True))
            assert sum(a == b for a, b in pairs) > 0.85 * head_bytes
    tails = [torch.frombuffer(bytearray(b.tail_bytes()), dtype=torch.float16).float() for b in (one, several)]
    assert tails[0].numel() == tails[1].numel() > 0
    assert float((tails[0] - tails[1]).abs().mean()) < 0.02 * float(tails[0].abs().mean())


@pytest.mark.parametrize(("family", "size"), GROUPS)
def test_a_rank_holds_byte_ranges_of_the_blocks(family: str, size: int, group: Group, make_prompt: Any) -> None:
    runtime = group(size, family)
    blocks, _ = compute(runtime, make_prompt(150), [])
    assert isinstance(blocks, GroupPrompt)
    rank = runtime.rank
    assert len(rank.heads) == max(4 // size, 1)
    for index in range(blocks.num_blocks):
        own = blocks.part.own.layout.join_payload(
            blocks.part.own.pool[index], blocks.part.own.sinks if index == 0 else None
        )
        ranges = shard_ranges(runtime.layout, index, rank.heads)
        assert torch.equal(own, take(blocks.shared.payload(index), ranges))
        shares = [bytes(blocks.layer_share(index, layer)) for layer in range(runtime.layout.num_layers)]
        assert b"".join(shares) == bytes(blocks.payload(index))


@pytest.mark.parametrize(("family", "size"), GROUPS)
def test_cached_blocks_change_nothing(family: str, size: int, group: Group, make_prompt: Any) -> None:
    """Every rank takes its heads out of whole blocks: what is computed behind them keeps its bits."""
    runtime = group(size, family)
    token_ids = make_prompt(7 * 32 + 11)
    cold, token = compute(runtime, token_ids, [])
    for boundary in (1, 2, 5, 7):
        again, same_token = compute(runtime, token_ids, payloads(cold)[:boundary])
        assert payloads(again) == payloads(cold)
        assert again.tail_bytes() == cold.tail_bytes()
        assert same_token == token


def test_groups_of_another_size_make_another_class_of_blocks(group: Group) -> None:
    one, two = group(1).identity, group(2).identity
    assert one.numerics_class != two.numerics_class
    two.numerics_class = one.numerics_class
    assert one == two


def test_prompts_are_shared_between_requests(group: Group, make_prompt: Any) -> None:
    runtime = group(2)
    token_ids = make_prompt(4 * 32 + 3)
    cold, _ = compute(runtime, token_ids, [])
    executor = runtime.executors.prefill()
    first, second = executor.new_blocks(len(token_ids)), executor.new_blocks(len(token_ids))
    for index, payload in enumerate(payloads(cold)):
        first.load(index, torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        second.copy(index, first)
    work = PrefillPass(index=4, begin=4 * 32, token_ids=token_ids[4 * 32 :], wants_logits=False)
    assert executor.run(second, work, lambda layer: None) is None
    assert payloads(second) == payloads(cold)
    assert second.tail_bytes() == cold.tail_bytes()


def test_a_damaged_block_is_refused_before_another_rank_has_it(group: Group, make_prompt: Any) -> None:
    runtime = group(2)
    cold, _ = compute(runtime, make_prompt(40), [])
    damaged = torch.frombuffer(bytearray(cold.payload(0)), dtype=torch.uint8)
    damaged[-64:] = 0xFF  # scales that are not finite
    with pytest.raises(ValueError, match="not finite"):
        runtime.engine.new_blocks(40).load(0, damaged)
    compute(runtime, make_prompt(40), payloads(cold))
