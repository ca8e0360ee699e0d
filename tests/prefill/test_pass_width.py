"""One pass over several blocks packs what as many passes over one block pack, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from kvferry.deploy.causal_lm import SUPPORTED_FAMILIES
from kvferry.deploy.pass_width import MAX_PASS_BLOCKS, widest_pass
from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kernels.forward import AttentionStep
from kvferry.kernels.sampling import SampledToken, SamplingParams
from kvferry.kernels.spec import KVQuantSpec
from kvferry.prefill.engine import PrefillEngine
from kvferry.prefill.executor import LocalPrefill
from kvferry.prefill.job import PrefillJob
from kvferry.prefill.prompt_blocks import LocalPromptBlocks

BLOCK_SIZE = 32
LIMIT_S = 120.0


def compute(worker: ModelRuntime, token_ids: list[int], width: int) -> tuple[LocalPromptBlocks, int, list[int]]:
    """Blocks, first token, and the row count of each pass."""
    rows: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(worker.model, name)

        def hidden(self, ids: torch.Tensor, positions: torch.Tensor, step: AttentionStep) -> torch.Tensor:
            rows.append(len(ids))
            return worker.model.hidden(ids, positions, step)

    executor = LocalPrefill(Counting(), worker.selection.kernels, worker.layout, worker.loaded.device)
    engine = PrefillEngine(executor, max_pass_blocks=width)
    try:
        blocks, token = engine.compute(token_ids, timeout_s=LIMIT_S)
    finally:
        engine.close()
    return blocks, token.token_id, rows


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "float32") for family in SUPPORTED_FAMILIES), ("llama", "bfloat16")]
)
def test_every_width_gives_the_same_bytes(
    family: str, dtype: str, load_runtime: Callable[..., ModelRuntime], make_prompt: Any
) -> None:
    worker = load_runtime(family, dtype=dtype, spec=KVQuantSpec(block_size=BLOCK_SIZE, value_rotation="hadamard"))
    worker.engine.close()
    assert widest_pass(worker.model, worker.loaded.model, block_size=BLOCK_SIZE) == MAX_PASS_BLOCKS
    for length in (11 * BLOCK_SIZE + 21, 8 * BLOCK_SIZE):
        token_ids = make_prompt(length)
        alone, token, rows = compute(worker, token_ids, 1)
        tail = [21] if length % BLOCK_SIZE else []
        assert rows == [BLOCK_SIZE] * alone.num_blocks + tail
        for width in (2, 4, 8):
            blocks, same_token, rows = compute(worker, token_ids, width)
            assert max(rows) == width * BLOCK_SIZE
            assert torch.equal(blocks.pool, alone.pool)
            assert torch.equal(blocks.sinks, alone.sinks)
            assert torch.equal(blocks.tail, alone.tail)
            assert same_token == token


def test_a_pass_begins_behind_what_was_cached(load_runtime: Callable[..., ModelRuntime], make_prompt: Any) -> None:
    """At every boundary: then passes of one width lie elsewhere on the grid."""
    worker = load_runtime("llama", spec=KVQuantSpec(block_size=BLOCK_SIZE))
    worker.engine.close()
    token_ids = make_prompt(9 * BLOCK_SIZE + 5)
    whole, token, _ = compute(worker, token_ids, 4)
    for boundary in range(1, 9):
        executor = LocalPrefill(worker.model, worker.selection.kernels, worker.layout, worker.loaded.device)
        engine = PrefillEngine(executor, max_pass_blocks=4)
        blocks = engine.new_blocks(len(token_ids))
        for index in range(boundary):
            blocks.load(index, torch.frombuffer(bytearray(whole.payload(index)), dtype=torch.uint8))
        done: Future[list[SampledToken]] = Future()
        finished: list[int] = []
        job = PrefillJob(
            token_ids=token_ids,
            sampling=SamplingParams(),
            blocks=blocks,
            on_block=finished.append,
            on_done=done.set_result,
            on_error=done.set_exception,
        )
        engine.submit(job)
        assert done.result(LIMIT_S)[0].token_id == token
        engine.close()
        assert finished == list(range(boundary, 9))
        assert torch.equal(blocks.pool, whole.pool)
        assert torch.equal(blocks.tail, whole.tail)


def test_a_machine_whose_rows_depend_on_their_number(
    load_runtime: Callable[..., ModelRuntime], make_prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a pass is one block; found by trying, and taken from the wider check of decode's row counts."""
    monkeypatch.setattr("kvferry.deploy.models.can_prepack", lambda device, dtype: False)
    worker = load_runtime("llama", block_size=BLOCK_SIZE)
    linear = torch.nn.functional.linear

    def other_code(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        out = linear(x, *arguments)
        return out if x.shape[-2] <= 2 * BLOCK_SIZE else out * (1 + 2**-20)

    monkeypatch.setattr(torch.nn.functional, "linear", other_code)
    assert widest_pass(worker.model, worker.loaded.model, block_size=BLOCK_SIZE) == 2
    monkeypatch.undo()
    activation = type(worker.loaded.model.activations()[0])
    forward = activation.forward

    def other_end(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        return torch.cat([out[..., :1] * (1 + 2**-20), out[..., 1:]], -1) if x.shape[-2] > BLOCK_SIZE else out

    monkeypatch.setattr(activation, "forward", other_end)
    assert widest_pass(worker.model, worker.loaded.model, block_size=BLOCK_SIZE) == 1
    monkeypatch.undo()
    monkeypatch.setattr("kvferry.deploy.rank_model.rows_are_invariant", lambda *_, **__: False)
    narrow = load_runtime("llama", block_size=BLOCK_SIZE)
    assert narrow.engine._max_pass_blocks == 1
    assert worker.engine._max_pass_blocks == MAX_PASS_BLOCKS
    worker.close()
    narrow.close()
