"""`kvferry bench memory`: a long context's cache in memory and in time, each context and preset in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from transformers import AutoConfig

from kvferry.deploy.benchmark.memory_case import TRANSFORMERS, Fill, MemoryCase, MemoryRequest
from kvferry.deploy.benchmark.resident_memory import available_bytes
from kvferry.deploy.benchmark.stretched_model import stretched_model
from kvferry.deploy.models import ModelSource, find_model
from kvferry.deploy.spec_file import resolve_spec
from kvferry.kernels.layout import BlockLayout

SPARE_TOKENS = 128
"""Of the stretched window, for what is decoded."""
CASE_TIMEOUT_S = 3600.0
MODEL_BYTES = 2 * 2**30
"""Left for the model and the process when it is asked whether a cache fits."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    model: str
    presets: tuple[str, ...]
    """And transformers, where its cache fits into memory and the fill is random."""
    contexts: tuple[int, ...]
    fill: Fill
    tokens: int
    threads: int
    stretch: bool
    """Whether a context may be longer than the model's window."""
    case_timeout_s: float = CASE_TIMEOUT_S


@dataclass(frozen=True)
class Skipped:
    """A case that was not measured, and why."""

    preset: str
    context: int
    reason: str


def run_memory_plan(plan: MemoryPlan, on_progress: Progress) -> Iterator[MemoryCase | Skipped]:
    """Raises ValueError for what cannot be measured, RuntimeError when a case's process fails."""
    source = find_model(plan.model)
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as folder:
        source = _with_window(source, plan, Path(folder))
        for context in plan.contexts:
            for preset in (*plan.presets, *((TRANSFORMERS,) if plan.fill == "random" else ())):
                label = f"{preset}, {context:,} tokens"
                on_progress(label, 0.0)
                reason = _why_not(source, preset, context)
                if reason:
                    yield Skipped(preset, context, reason)
                    continue
                request = MemoryRequest(
                    model_path=source.path,
                    preset=preset,
                    context=context,
                    fill=plan.fill,
                    tokens=plan.tokens,
                    threads=plan.threads,
                    prefill_timeout_s=plan.case_timeout_s,
                )
                yield _in_process(request, label, plan.case_timeout_s, on_progress)


def window_of(source: ModelSource) -> int:
    window: int = AutoConfig.from_pretrained(source.path).max_position_embeddings
    return window


def _with_window(source: ModelSource, plan: MemoryPlan, folder: Path) -> ModelSource:
    needed = max(plan.contexts) + SPARE_TOKENS
    window = window_of(source)
    if needed > window and not plan.stretch:
        raise ValueError(
            f"{max(plan.contexts)} tokens of context and {SPARE_TOKENS} spare ones do not fit the window of "
            f"{source.name}, {window}: give a smaller --context, or --stretch"
        )
    return stretched_model(source, needed, folder)


def _why_not(source: ModelSource, preset: str, context: int) -> str:
    """A sentence when the cache would not fit into the machine's memory, or ""."""
    config = AutoConfig.from_pretrained(source.path)
    layout = BlockLayout(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        spec=resolve_spec("kv16" if preset == TRANSFORMERS else preset),
    )
    # transformers may keep fp32, and a step copies a layer of it.
    per_token = layout.bytes_per_token_bf16 * (2 if preset == TRANSFORMERS else layout.effective_bits(context) / 16)
    needed, free = int(per_token * context) + MODEL_BYTES, available_bytes()
    return f"it takes up to {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free" if needed > free else ""


def _in_process(request: MemoryRequest, label: str, timeout_s: float, on_progress: Progress) -> MemoryCase:
    command = [sys.executable, "-m", "kvferry.deploy.benchmark.memory_case"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        killer = threading.Timer(timeout_s, process.kill)
        killer.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(asdict(request)) + "\n")
            process.stdin.close()
            result = _read(process.stdout, label, on_progress)
            process.wait(30)
        finally:
            killer.cancel()
            process.kill()
        if result is None:
            errors.seek(0)
            tail = errors.read().strip().splitlines()[-1:]
            raise RuntimeError(
                f"the process of {label} ended with {process.returncode} and no result after at most {timeout_s:.0f} s "
                f"(a negative number: killed, by the time limit or for lack of memory): {''.join(tail)}"
            )
    return result


def _read(lines: IO[str], label: str, on_progress: Progress) -> MemoryCase | None:
    """The result among the lines of a case's process. Raises ValueError with its error."""
    for line in lines:
        message = json.loads(line)
        if "error" in message:
            raise ValueError(f"{label}: {message['error']}")
        if "result" in message:
            return MemoryCase(**message["result"])
        on_progress(f"{label}: {message['phase']}", message["done"])
    return None
