"""The numerics class: workers share blocks only if they compute the same bits, and this says so by measuring.

Declared facts (kernels, dtype, device, library versions) are hashed together with a probe: the bytes that this worker
packs for a fixed prompt. Two workers of one class have shown that they agree on it.
"""

from __future__ import annotations

import hashlib
import threading

import torch
import transformers

from kvferry.deploy.models import LoadedModel
from kvferry.kernels.forward import ROW_COUNTS, CausalModel
from kvferry.kernels.sampling import SampledToken, SamplingParams
from kvferry.prefill.engine import PrefillEngine, PrefillJob

PROBE_TIMEOUT_S = 300.0


def numerics_class(loaded: LoadedModel, engine: PrefillEngine, *, kernels_name: str, rows_invariant: bool) -> bytes:
    """SHA-256 over declared facts and the probe. 32 bytes. Runs a short prefill."""
    device = loaded.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = [
        "kvferry-numerics",
        f"kernels={kernels_name}",
        f"dtype={loaded.model.dtype}",
        f"device={where}",
        f"rows-invariant={rows_invariant}",
        f"torch={torch.__version__}",
        f"transformers={transformers.__version__}",
        f"probe={probe(engine, loaded.model.vocab_size).hex()}",
    ]
    digest = hashlib.sha256()
    for fact in facts:
        raw = fact.encode()
        digest.update(len(raw).to_bytes(4, "little") + raw)
    return digest.digest()


def probe(engine: PrefillEngine, vocab_size: int) -> bytes:
    """SHA-256 over the packed blocks and the tail of a fixed prompt: two blocks and five tokens."""
    block_size = engine.layout.block_size
    token_ids = [(i * i * 31 + i * 17 + 7) % vocab_size for i in range(2 * block_size + 5)]
    done = threading.Event()
    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        failures.append(error)
        done.set()

    def finish(_: SampledToken) -> None:
        done.set()

    blocks = engine.new_blocks(len(token_ids))
    engine.submit(
        PrefillJob(
            token_ids=token_ids,
            sampling=SamplingParams(max_tokens=1),
            blocks=blocks,
            on_block=lambda index: None,
            on_done=finish,
            on_error=fail,
        )
    )
    if not done.wait(PROBE_TIMEOUT_S):
        raise TimeoutError(f"the numerics probe did not finish within {PROBE_TIMEOUT_S} s")
    if failures:
        raise failures[0]
    digest = hashlib.sha256()
    for index in range(blocks.num_blocks):
        digest.update(blocks.payload(index))
    digest.update(blocks.tail_bytes())
    return digest.digest()


def rows_are_invariant(model: CausalModel, hidden_size: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a row of the output projection has the same bits at every row count that decode pads to."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, hidden_size, generator=generator).to(device=device, dtype=dtype)
    wide = model.logits(rows)
    return all(torch.equal(model.logits(rows[:n].contiguous()), wide[:n]) for n in (*ROW_COUNTS, 12, 13, 16, 32))
