"""The numerics class: workers share blocks only if they compute the same bits, and this says so by measuring.

Declared facts (kernels, dtype, device, library versions) are hashed together with a probe: the bytes that this worker
packs for a fixed prompt. Two workers of one class have shown that they agree on it.
"""

from __future__ import annotations

import hashlib

import torch
import transformers

from kvferry.deploy.causal_lm import TransformersModel
from kvferry.deploy.models import LoadedModel
from kvferry.deploy.row_invariance import activations_keep_rows, linears_keep_rows
from kvferry.kernels.rotation import hadamard
from kvferry.prefill.engine import PrefillEngine

PROBE_TIMEOUT_S = 300.0
PROBE_TAILS = (1, 5, 11, 27)
"""Tokens after the first block: rows at each of the row counts that take other code in a matmul."""


def numerics_class(
    loaded: LoadedModel, engine: PrefillEngine, *, kernels_name: str, rows_invariant: bool, num_ranks: int
) -> bytes:
    """SHA-256 over declared facts and the probe. 32 bytes. Runs a short prefill. `num_ranks` that share the model: each
    number sums in another order."""
    device = loaded.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = [
        "kvferry-numerics",
        f"kernels={kernels_name}",
        f"dtype={loaded.model.dtype}",
        f"device={where}",
        f"rows-invariant={rows_invariant}",
        f"ranks={num_ranks}",
        f"torch={torch.__version__}",
        f"transformers={transformers.__version__}",
        f"probe={probe(engine).hex()}",
    ]
    digest = hashlib.sha256()
    for fact in facts:
        raw = fact.encode()
        digest.update(len(raw).to_bytes(4, "little") + raw)
    return digest.digest()


def probe(engine: PrefillEngine) -> bytes:
    """SHA-256 over the packed blocks and the tails of fixed prompts, which end at several widths."""
    block_size = engine.layout.block_size
    digest = hashlib.sha256()
    for tail in PROBE_TAILS:
        token_ids = [(i * i * 31 + i * 17 + 7 * tail) % engine.vocab_size for i in range(block_size + tail)]
        blocks, _ = engine.compute(token_ids, timeout_s=PROBE_TIMEOUT_S)
        digest.update(blocks.payload(0))
        digest.update(blocks.tail_bytes())
    return digest.digest()


def rows_are_invariant(model: TransformersModel, *, rotated: bool, max_rows: int) -> bool:
    """Whether the model's matmuls, the rotation of V where there is one, and the activation functions give a row the
    same bits at every row count of a decode batch."""
    linears = model.distinct_linears()
    widths = [linear.out_features for linear in linears if linear.out_features < model.vocab_size]
    if rotated:
        rotation = torch.nn.Linear(model.head_dim, model.head_dim, bias=False, device=model.device)
        rotation.weight = torch.nn.Parameter(hadamard(model.head_dim, model.device))
        linears.append(rotation)
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    return linears_keep_rows(linears, max_rows=max_rows) and activations_keep_rows(
        model.activations(), columns=widths, max_rows=max_rows, like=like
    )
