"""Whatever a policy decides, and wherever it leaves a fetch: the same bytes and the same first token."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvferry.deploy.worker_server import ModelRuntime
from kvferry.kernels.sampling import SamplingParams
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.config import ClientConfig, NodeConfig
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.server import KVStoreServer
from kvferry.prefill.config import PrefillConfig
from kvferry.prefill.fetch_policy import AlwaysFetch, FetchCounters, FetchEstimates, FetchQuestion, NeverFetch
from kvferry.prefill.session import HandoffReady, PrefillSession, PrefillUsage

BLOCK_SIZE = 32
NUM_BLOCKS = 6


@dataclass
class Script:
    """A policy and its choices, by what a test has drawn."""

    look: bool
    wanted: int
    go_on_until: int
    impatient_at: int
    """The record that is not waited for at all."""

    def __post_init__(self) -> None:
        self.counters = FetchCounters()
        self.reason = "script"
        self.num_arrived = 0

    def begin(self, question: FetchQuestion) -> Script:
        return self

    def estimates(self) -> FetchEstimates:
        return FetchEstimates()

    def wants_lookup(self) -> bool:
        return self.look

    def found(self, num_blocks: int, seconds: float) -> int:
        return min(num_blocks, self.wanted)

    def patience_s(self) -> float:
        return 0.0 if self.num_arrived == self.impatient_at else math.inf

    def arrived(self, num_bytes: int, seconds: float) -> bool:
        self.num_arrived += 1
        return self.num_arrived < self.go_on_until

    def gave_up(self, seconds: float) -> None: ...

    def finish(self) -> None: ...


@dataclass
class Outcome:
    records: list[bytes]
    tokens: list[int]
    tail: bytes
    usage: PrefillUsage


async def prefill_all(worker: ModelRuntime, token_ids: list[int], policies: list[Any]) -> tuple[list[Outcome], int]:
    """The same prompt with each policy in turn, and how many leases are left; the first one finds an empty store."""
    backend = MemoryBackend(capacity_bytes=2**28)
    server = KVStoreServer(backend, NodeConfig())
    await server.start()
    outcomes = []
    namespace = namespace_of(worker.identity, tenant="default", block_size=BLOCK_SIZE)
    try:
        async with StoreClient(ClientConfig(address=server.address, lookup_timeout_s=5.0)) as store:
            for policy in policies:
                session = PrefillSession(
                    token_ids=token_ids,
                    sampling=SamplingParams(),
                    namespace=namespace,
                    engine=worker.engine,
                    store=store,
                    fetch_policy=policy,
                    config=PrefillConfig(lookup_timeout_s=5.0),
                    remaining_s=60.0,
                )
                await session.run()
                handoff = None
                while not isinstance(event := await session.next_event(), PrefillUsage):
                    handoff = event if isinstance(event, HandoffReady) else handoff
                assert handoff is not None
                records = [session.record(index) for index in range(NUM_BLOCKS)]
                outcomes.append(Outcome(records, [t.token_id for t in handoff.first_tokens], handoff.tail, event))
            async with asyncio.timeout(10):
                while len(backend.leases):
                    await asyncio.sleep(0.001)
            return outcomes, len(backend.leases)
    finally:
        await server.stop(0.2)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.builds(
            Script,
            look=st.integers(0, 4).map(bool),
            wanted=st.integers(0, NUM_BLOCKS),
            go_on_until=st.integers(1, NUM_BLOCKS + 1),
            impatient_at=st.integers(0, 2 * NUM_BLOCKS),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_no_decision_changes_a_byte(
    runtime: Callable[[str], ModelRuntime], make_prompt: Any, scripts: list[Script]
) -> None:
    token_ids = make_prompt(NUM_BLOCKS * BLOCK_SIZE + 9, seed=77)
    (first, *others), leases = asyncio.run(prefill_all(runtime("llama"), token_ids, [NeverFetch(), *scripts]))
    assert first.usage.num_blocks_fetched == 0 and first.usage.store_tokens_written == NUM_BLOCKS * BLOCK_SIZE
    assert leases == 0
    for script, outcome in zip(scripts, others, strict=True):
        assert (outcome.records, outcome.tokens, outcome.tail) == (first.records, first.tokens, first.tail)
        usage = outcome.usage
        assert usage.num_blocks_fetched + usage.num_blocks_recomputed == (NUM_BLOCKS if script.look else 0)
        if script.look:
            most = min(script.wanted, script.go_on_until)
            assert min(most, script.impatient_at) <= usage.num_blocks_fetched <= most  # what is there is taken at once
            assert usage.fetch_abandoned == (usage.num_blocks_fetched < script.wanted)


@pytest.mark.parametrize("length", [BLOCK_SIZE - 1, BLOCK_SIZE])
async def test_a_prompt_without_a_block_to_fetch_does_not_ask(
    length: int, runtime: Callable[[str], ModelRuntime], make_prompt: Any
) -> None:
    """The last token's block is always computed, so one block alone is not looked up."""
    policy = AlwaysFetch()
    worker = runtime("llama")
    namespace = namespace_of(worker.identity, tenant="default", block_size=BLOCK_SIZE)
    async with StoreClient(ClientConfig(address="127.0.0.1:9")) as store:  # nobody is there
        session = PrefillSession(
            token_ids=make_prompt(length),
            sampling=SamplingParams(),
            namespace=namespace,
            engine=worker.engine,
            store=store,
            fetch_policy=policy,
            config=PrefillConfig(),
            remaining_s=60.0,
        )
        await session._fetch_cached()
        assert store.counters.failures == 0 and session._usage.fetch_choice == ""
