"""`kvferry bench chooser`: what the store costs prompts that gain little or nothing from it.

Short prompts on one prefill worker and one store node, a process of its own, over loopback: without a store ("off"),
with blocks that are not there ("miss"), and with blocks that are ("hit"). The contenders take turns, round by round,
because a shared machine's speed changes from minute to minute; only ratios within one run mean anything. Times are of
prefill alone: from the request to its first token, publishing going on behind it.
"""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from kvferry.deploy.worker_server import ModelConfig, ModelRuntime
from kvferry.kernels.sampling import SamplingParams
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.config import ClientConfig
from kvferry.kvstore.identity import namespace_of
from kvferry.prefill.config import FetchMode, PrefillConfig
from kvferry.prefill.fetch_policy import FetchPolicy
from kvferry.prefill.server import FETCH_POLICIES
from kvferry.prefill.session import HandoffReady, PrefillSession, PrefillUsage

TAIL_TOKENS = 16
LIMIT_S = 600.0
MODES: tuple[FetchMode, ...] = ("measured", "always")


@dataclass(frozen=True)
class ChooserCase:
    """Medians over the rounds. Ratios are medians of the rounds' ratios to "off"; above 1: slower than without."""

    blocks: int
    mode: str
    """Of PrefillConfig.fetch."""
    off_s: float
    miss_s: float
    hit_s: float
    miss_ratio: float
    hit_ratio: float
    best_miss_ratio: float
    """Of the fastest rounds: nearer to an idle machine than the median."""
    best_hit_ratio: float
    lookup_s: float
    """Of a miss: all that it waited for the store."""
    fetched: int
    """Rounds whose hit was fetched."""
    rounds: int


def bench_chooser(
    config: ModelConfig,
    *,
    blocks: Sequence[int],
    rounds: int,
    progress: Callable[[str], None] = lambda line: None,
) -> list[ChooserCase]:
    """Runs the comparison. Raises ValueError for prompts over the model's window, RuntimeError without a node."""
    runtime = ModelRuntime(config)
    try:
        longest = max(blocks) * runtime.layout.block_size + TAIL_TOKENS
        if longest >= runtime.max_model_len:
            raise ValueError(f"{longest} tokens do not fit the model's window of {runtime.max_model_len} tokens")
        with _node() as address:
            return asyncio.run(_measure(runtime, address, blocks, rounds, progress))
    finally:
        runtime.close()


def print_chooser_cases(cases: list[ChooserCase]) -> None:
    table = Table(title=f"prefill with a store against without, medians; load {os.getloadavg()[0]:.1f}")
    for column in ("blocks", "fetch", "off", "miss", "hit", "miss/off (best)", "hit/off (best)", "look-up", "fetched"):
        table.add_column(column, justify="right")
    for case in cases:
        table.add_row(
            str(case.blocks),
            case.mode,
            *(f"{1e3 * seconds:.1f} ms" for seconds in (case.off_s, case.miss_s, case.hit_s)),
            f"{case.miss_ratio:.3f} ({case.best_miss_ratio:.3f})",
            f"{case.hit_ratio:.3f} ({case.best_hit_ratio:.3f})",
            f"{1e3 * case.lookup_s:.2f} ms",
            f"{case.fetched} of {case.rounds}",
        )
    Console(width=110).print(table)


async def _measure(
    runtime: ModelRuntime, address: str, blocks: Sequence[int], rounds: int, progress: Callable[[str], None]
) -> list[ChooserCase]:
    generator = torch.Generator().manual_seed(0)
    cases = []
    async with StoreClient(ClientConfig(address=address)) as store:
        policies: dict[FetchMode, FetchPolicy] = {mode: FETCH_POLICIES[mode]() for mode in MODES}
        for num_blocks in blocks:
            length = num_blocks * runtime.layout.block_size + TAIL_TOKENS
            seconds: dict[tuple[FetchMode, str], list[float]] = {}
            lookups: dict[FetchMode, list[float]] = {mode: [] for mode in MODES}
            fetched = dict.fromkeys(MODES, 0)
            for number in range(rounds + 1):
                for mode, policy in policies.items():
                    token_ids = torch.randint(runtime.model.vocab_size, (length,), generator=generator).tolist()
                    order = ("off", "miss", "hit") if number % 2 else ("miss", "hit", "off")
                    for what in order:
                        pieces_of = [] if what == "hit" else range(num_blocks)
                        taken, usage = await _ttft(
                            runtime, None if what == "off" else store, policy, token_ids, pieces_of=pieces_of
                        )
                        if number == 0:  # warms up
                            continue
                        seconds.setdefault((mode, what), []).append(taken)
                        if what == "miss":
                            lookups[mode].append(usage.fetch_seconds)
                        elif what == "hit":
                            fetched[mode] += usage.num_blocks_fetched == num_blocks
                progress(f"{num_blocks} blocks: round {number} of {rounds}")
            for mode in MODES:
                off, miss, hit = (seconds[mode, what] for what in ("off", "miss", "hit"))
                cases.append(
                    ChooserCase(
                        blocks=num_blocks,
                        mode=mode,
                        off_s=statistics.median(off),
                        miss_s=statistics.median(miss),
                        hit_s=statistics.median(hit),
                        miss_ratio=statistics.median(b / a for a, b in zip(off, miss, strict=True)),
                        hit_ratio=statistics.median(b / a for a, b in zip(off, hit, strict=True)),
                        best_miss_ratio=min(miss) / min(off),
                        best_hit_ratio=min(hit) / min(off),
                        lookup_s=statistics.median(lookups[mode]),
                        fetched=fetched[mode],
                        rounds=rounds,
                    )
                )
    return cases


async def _ttft(
    runtime: ModelRuntime,
    store: StoreClient | None,
    policy: FetchPolicy,
    token_ids: list[int],
    *,
    pieces_of: Collection[int],
) -> tuple[float, PrefillUsage]:
    """Seconds to the first token, and the usage at the end, when everything is published. Decode takes the blocks
    `pieces_of` in pieces, as it does those that the store did not have when it asked."""
    started = time.perf_counter()
    session = PrefillSession(
        token_ids=token_ids,
        sampling=SamplingParams(),
        namespace=namespace_of(runtime.identity, tenant="bench", block_size=runtime.layout.block_size),
        engine=runtime.engine,
        store=store,
        fetch_policy=policy,
        config=PrefillConfig(),
        remaining_s=LIMIT_S,
        pieces_of=pieces_of,
    )
    running = asyncio.create_task(session.run())
    decoding = asyncio.create_task(_take_pieces(session))
    taken = 0.0
    while not isinstance(event := await session.next_event(), PrefillUsage):
        if isinstance(event, HandoffReady):
            taken = time.perf_counter() - started
    await running
    decoding.cancel()
    session.close()
    return taken, event


async def _take_pieces(session: PrefillSession) -> None:
    assert session.pieces is not None
    while True:
        await session.pieces.next()


@contextmanager
def _node() -> Iterator[str]:
    """The address of a store node that is started for this."""
    command = [sys.executable, "-m", "kvferry.kvstore", "--port", "0", "--memory", "1GiB"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"serving on ([^\s,]+)", line):
                yield found.group(1)
                return
        raise RuntimeError("the store node did not start")
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()
