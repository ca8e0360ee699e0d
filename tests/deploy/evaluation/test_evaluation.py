"""`kvferry eval`: its numbers against hand-made ones, and the packed path through the real product."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry.deploy.evaluation.command import EvalPlan, run_plan
from kvferry.deploy.evaluation.dense import DenseStep, dense_logits
from kvferry.deploy.evaluation.needle import NEEDLE, needle_key, needle_prompt
from kvferry.deploy.evaluation.packed import PackedRun
from kvferry.deploy.evaluation.run import agreement
from kvferry.deploy.evaluation.scores import Oracle, Scores
from kvferry.deploy.evaluation.text import default_text, read_text, windows
from kvferry.deploy.models import find_model, load_model, load_tokenizer
from kvferry.kernels.presets import PRESETS


@pytest.fixture(scope="module")
def loaded(tiny_model: Callable[[str], Path]) -> Any:
    return load_model(find_model(str(tiny_model("llama"))), device=torch.device("cpu"), dtype=torch.float32)


def test_windows_are_spread_over_the_text() -> None:
    cut = windows(list(range(100)), length=10, count=4)
    assert cut.shape == (4, 10)
    assert cut[:, 0].tolist() == [0, 30, 60, 90]
    assert windows(list(range(11)), length=10, count=8)[:, 0].tolist() == [0, 1]  # no window twice
    with pytest.raises(ValueError, match="the text has 9 tokens, a window needs 10"):
        windows(list(range(9)), length=10, count=1)


def test_texts(tmp_path: Path) -> None:
    assert len(default_text()) > 200_000
    path = tmp_path / "text"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(path)


def test_scores() -> None:
    """Two predictions of three tokens, by hand."""
    fp = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]]).log()
    ours = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.6, 0.2]]).log()
    oracle = Oracle(torch.tensor([[9, 9, 0, 1]]), context=1, logits=fp)
    scores = Scores()
    for index, row in enumerate(ours):
        scores.add(oracle, 0, index, row)
    kl = [0.5 * math.log(2) - 0.25 * math.log(2), 0.2 * math.log(0.5) + 0.8 * math.log(0.8 / 0.6)]
    assert scores.kl == pytest.approx(sum(kl) / 2, rel=1e-4)
    assert scores.perplexity == pytest.approx(math.exp(-(math.log(0.25) + math.log(0.6)) / 2), rel=1e-4)
    assert scores.perplexity_fp == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.8)) / 2), rel=1e-4)
    assert (scores.top1, scores.tokens) == (0.5, 2)


def test_agreement() -> None:
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert agreement([1], [1]) == 1.0


def observed(run: PackedRun, text: torch.Tensor, context: int) -> torch.Tensor:
    rows: dict[tuple[int, int], torch.Tensor] = {}
    run.observe(text, context=context, observer=lambda w, i, row: rows.__setitem__((w, i), row.clone()))
    steps = text.shape[1] - context - 1
    assert sorted(rows) == [(w, i) for w in range(len(text)) for i in range(steps)]
    return torch.stack([torch.stack([rows[w, i] for i in range(steps)]) for w in range(len(text))])


def test_sixteen_bits_through_the_product_are_the_unquantized_cache(loaded: Any, make_prompt: Any) -> None:
    """Windows that end in the middle of a block and fill one while decoding."""
    text = torch.tensor([make_prompt(300, seed=seed) for seed in range(3)])
    run = PackedRun(loaded, PRESETS["kv16"], kernels="reference")
    ours = observed(run, text, 250)
    run.close()
    theirs = torch.stack([dense_logits(loaded.model, w, DenseStep(), context=250) for w in text])
    error = (ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
    assert error < 0.01  # K and V are rounded to fp16
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.98


def test_forced_text_is_what_a_greedy_answer_saw(loaded: Any, make_prompt: Any) -> None:
    """Forcing a preset's own greedy answer predicts that answer."""
    run = PackedRun(loaded, PRESETS["kv2"], kernels="reference")
    prompts = [make_prompt(140, seed=seed) for seed in range(2)]
    answers = run.generate(prompts, max_tokens=12)
    text = torch.tensor([p + a for p, a in zip(prompts, answers, strict=True)])
    predicted = observed(run, text, 140).argmax(-1)
    run.close()
    assert predicted.tolist() == [a[1:] for a in answers]


def test_needle_prompts(loaded: Any) -> None:
    tokenizer = load_tokenizer(loaded.source)
    for depth in (0.0, 0.5, 1.0):
        key = needle_key(600, depth)
        ids = needle_prompt(tokenizer, length=600, depth=depth, key=key)
        text = tokenizer.decode(ids)
        assert 500 < len(ids) <= 600 and NEEDLE.format(key=key).strip() in text
        assert abs(text.index(key) / len(text) - depth) < 0.2
    with pytest.raises(ValueError, match="needs at least"):
        needle_prompt(tokenizer, length=20, depth=0.5, key="12345")


def test_run_plan(tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = EvalPlan(
        model=str(tiny_model("llama")),
        presets=("kv2", "kv4"),
        baselines=("kivi2", "kivi4"),
        text=None,
        contexts=(200,),
        windows=2,
        predict=6,
        generate=4,
        needle_lengths=(256,),
        kernels="reference",
    )
    run_plan(plan, json_path=tmp_path / "out.json", plots=None)
    content = json.loads((tmp_path / "out.json").read_text())
    results = {r["preset"]: r for r in content["results"]}
    assert {"kv2", "kv4", "kivi2", "kivi4"} <= set(results)
    for r in results.values():
        assert (r["context"], r["windows"], r["predicted_tokens"]) == (200, 2, 12)
        assert r["kl"] > 0 and r["perplexity"] > 1
    assert results["kv4"]["kl"] < results["kv2"]["kl"]
    assert results["kv2"]["effective_bits"] < 2.65 and results["kv4"]["effective_bits"] < 4.4
    assert set(content["agreement"]) == {"kv2", "kv4"}
    assert {(n["preset"], n["length"]) for n in content["needles"]} == {(p, 256) for p in ("kv2", "kv4", "kv16")}
    assert "kivi2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": (4000,)}, "the plan needs 4007 tokens, the model's window has 2048"),
        ({"needle_lengths": (9000,)}, "needs 9000 tokens"),
        ({"contexts": (0,)}, "must be positive"),
        ({"presets": ("kv7",)}, "no preset 'kv7'"),
        ({"model": "nothing"}, "no model 'nothing'"),
    ],
    ids=str,
)
def test_plans_that_cannot_be_are_refused(
    changes: dict[str, Any], message: str, tiny_model: Callable[[str], Path]
) -> None:
    options: dict[str, Any] = {
        "model": str(tiny_model("llama")),
        "presets": ("kv2",),
        "baselines": (),
        "text": None,
        "contexts": (64,),
        "windows": 1,
        "predict": 6,
        "generate": 0,
        "needle_lengths": (),
        "kernels": "reference",
    }
    with pytest.raises(ValueError, match=message):
        run_plan(EvalPlan(**options | changes), json_path=None, plots=None)
