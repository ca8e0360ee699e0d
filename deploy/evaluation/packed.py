"""A preset through the product's own code: prefill engine, store on a socket, decode engine.

The text is forced on the decode engine at its model seam: `_ForcedModel` hands the real logits to the observer and
gives the engine logits whose argmax is the text's next token.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kvferry.decode.cache import PackedCache
from kvferry.decode.engine import DecodeEngine
from kvferry.decode.executor import LocalDecode
from kvferry.decode.sequence import Sequence, TokenEvent
from kvferry.deploy.models import LoadedModel
from kvferry.kernels.dispatch import select_kernels
from kvferry.kernels.forward import AttentionStep, CausalModel
from kvferry.kernels.layout import LAYOUT_VERSION, BlockLayout
from kvferry.kernels.rotation import RotatedModel
from kvferry.kernels.sampling import SamplingParams, TokenHistory
from kvferry.kernels.spec import KVQuantSpec
from kvferry.kvstore.client import StoreClient
from kvferry.kvstore.codec import encode_record
from kvferry.kvstore.config import ClientConfig, NodeConfig
from kvferry.kvstore.key import Namespace, block_keys
from kvferry.kvstore.memory_backend import MemoryBackend
from kvferry.kvstore.server import KVStoreServer
from kvferry.prefill.engine import PrefillEngine
from kvferry.prefill.executor import LocalPrefill
from kvferry.prefill.prompt_blocks import PromptBlocks

PREFILL_TIMEOUT_S = 3600.0
STEP_TIMEOUT_S = 60.0
"""Of one decode step of all windows together."""


class Observer(Protocol):
    def __call__(self, window: int, index: int, logits: Tensor) -> None:
        """Real logits fp32 [V] of one prediction."""
        ...


class PackedRun:
    """A model under one quantization spec."""

    def __init__(self, loaded: LoadedModel, spec: KVQuantSpec, *, kernels: str | None = None) -> None:
        """Raises ValueError when the spec or the kernels asked for cannot be."""
        model = loaded.model
        self.layout = BlockLayout(
            num_layers=model.num_layers, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, spec=spec
        )
        self._device = loaded.device
        self._kernels = select_kernels(loaded.device, head_dim=model.head_dim, impl=kernels).kernels
        self._model: CausalModel = model if spec.value_rotation == "none" else RotatedModel(model, loaded.device)
        self._prefill = PrefillEngine(LocalPrefill(self._model, self._kernels, self.layout, loaded.device))
        self._namespace = Namespace(
            tenant="evaluation",
            weights_digest=loaded.weights_digest,
            tokenizer_digest=bytes(32),
            spec_digest=spec.digest(),
            layout_version=LAYOUT_VERSION,
            numerics_class=bytes(32),
            block_size=spec.block_size,
        )

    @property
    def kernels_name(self) -> str:
        return self._kernels.name

    def close(self) -> None:
        self._prefill.close()

    def observe(
        self, windows: Tensor, *, context: int, observer: Observer, on_step: Callable[[], None] = lambda: None
    ) -> None:
        """Prefills the first `context` tokens of each window, moves the blocks through a store, and decodes the rest.

        windows: int64 [W, context + P + 1]. `observer` gets W * P predictions, on another thread; `on_step` is called
        after each of P steps. Raises what prefill, store or decode raised, or TimeoutError.
        """
        forced = _ForcedModel(self._model, windows[:, context:], observer, on_step)
        prompts = windows[:, :context].tolist()
        steps = windows.shape[1] - context - 1
        self._decode(forced, prompts, windows[:, context].tolist(), steps, on_token=lambda window, token: None)

    def generate(
        self, prompts: list[list[int]], *, max_tokens: int, on_step: Callable[[], None] = lambda: None
    ) -> list[list[int]]:
        """Greedy answers of `max_tokens` tokens, end tokens included, with the cache moved through a store.

        Raises as `observe` does.
        """
        answers: list[list[int]] = [[] for _ in prompts]

        def keep(window: int, token_id: int) -> None:
            answers[window].append(token_id)
            if window == 0:
                on_step()

        self._decode(self._model, prompts, None, max_tokens - 1, on_token=keep)
        return answers

    def _decode(
        self,
        model: CausalModel,
        prompts: list[list[int]],
        first_tokens: list[int] | None,
        steps: int,
        *,
        on_token: Callable[[int, int], None],
    ) -> None:
        """Prefill, store, and `steps` decode steps after the first token, which is the prefill's where not given."""
        computed = [self._prefill.compute(prompt, timeout_s=PREFILL_TIMEOUT_S) for prompt in prompts]
        payloads = asyncio.run(self._through_store(prompts, [blocks for blocks, _ in computed]))
        size = self.layout.block_size
        room = [-(-(len(prompt) + steps + 1) // size) for prompt in prompts]
        cache = PackedCache(
            self.layout, num_blocks=sum(room), num_slots=len(prompts), kernels=self._kernels, device=self._device
        )
        waiting = _Listener(len(prompts), on_token)
        sequences = []
        for slot, (blocks, sampled) in enumerate(computed):
            ids = list(range(sum(room[:slot]), sum(room[: slot + 1])))
            self._load(cache, slot, ids, blocks, payloads[slot])
            first = sampled.token_id if first_tokens is None else first_tokens[slot]
            on_token(slot, first)
            history = TokenHistory.of(prompts[slot])
            history.append(first)
            sequences.append(
                Sequence(
                    num_prompt_tokens=len(prompts[slot]),
                    sampling=SamplingParams(max_tokens=steps + 1),
                    history=history,
                    slot=slot,
                    block_ids=ids,
                    num_blocks=blocks.num_blocks,
                    tail_len=blocks.tail_len,
                    last_token=first,
                    listener=waiting,
                )
            )
        engine = DecodeEngine(LocalDecode(model, self._kernels, cache))
        try:
            for sequence in sequences:
                engine.add(sequence)
            waiting.wait(STEP_TIMEOUT_S * (steps + 1))
        finally:
            engine.close()

    async def _through_store(self, prompts: list[list[int]], computed: list[PromptBlocks]) -> list[list[bytes]]:
        """Every block as a record into a store node on a loopback socket and back: the payloads of each prompt."""
        size = sum(b.num_blocks for b in computed) * (self.layout.payload_bytes(0) + 4096)
        server = KVStoreServer(MemoryBackend(capacity_bytes=2 * size + 2**20), NodeConfig())
        await server.start()
        received = []
        try:
            async with StoreClient(ClientConfig(address=server.address)) as store:
                for prompt, blocks in zip(prompts, computed, strict=True):
                    keys = block_keys(self._namespace, prompt)
                    for index, key in enumerate(keys):
                        record = encode_record(
                            key=key,
                            namespace=self._namespace.digest(),
                            block_index=index,
                            num_tokens=self.layout.block_size,
                            payload=[blocks.payload(index)],
                        )
                        await store.put(key, record)
                    fetched = store.get(keys, namespace=self._namespace.digest()) if keys else None
                    received.append([bytes(record.payload) async for record in fetched] if fetched else [])
        finally:
            await server.stop(0.0)
        return received

    def _load(self, cache: PackedCache, slot: int, ids: list[int], blocks: PromptBlocks, payloads: list[bytes]) -> None:
        for index, payload in enumerate(payloads):
            whole = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            cache.load_block(whole, index, block_id=ids[index], slot=None)
        if payloads:
            cache.use_sinks(slot, ids[0])
        cache.load_tail(slot, blocks.tail_bytes())


class _Listener:
    """`SequenceListener` that passes tokens on by slot, and waits for the engine to release all sequences."""

    def __init__(self, count: int, on_token: Callable[[int, int], None]) -> None:
        self._left = count
        self._on_token = on_token
        self._finished = threading.Event()
        self._error: Exception | None = None

    def token(self, sequence: Sequence, event: TokenEvent) -> None:
        self._on_token(sequence.slot, event.token.token_id)

    def error(self, sequence: Sequence, error: Exception) -> None:
        self._error = error

    def block_used(self, sequence: Sequence) -> None:
        """All blocks were there from the beginning."""

    def released(self, sequence: Sequence) -> None:
        self._left -= 1  # on the engine's thread only
        if self._left == 0 or self._error is not None:
            self._finished.set()

    def wait(self, timeout_s: float) -> None:
        if not self._finished.wait(timeout_s):
            raise TimeoutError("the decode engine did not finish the text in time")
        if self._error is not None:
            raise self._error


class _ForcedModel:
    """`CausalModel` that makes a greedy engine write given text.

    All sequences end at the same length and join in the order of windows, so row r of a step is the r-th of those that
    have not ended. They may join over several steps.
    """

    def __init__(self, model: CausalModel, text: Tensor, observer: Observer, on_step: Callable[[], None]) -> None:
        """text: int64 [W, P + 1]: the token that the first step reads, then those to be predicted."""
        self._model = model
        self._text = text.tolist()
        self._observer = observer
        self._on_step = on_step
        self._done = [0] * len(self._text)
        self._rows: list[int] = []
        self.num_layers = model.num_layers
        self.num_kv_heads = model.num_kv_heads
        self.head_dim = model.head_dim
        self.vocab_size = model.vocab_size
        self.max_model_len = model.max_model_len

    def hidden(self, token_ids: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        real = int((positions > 0).sum())  # padding is at position 0, a decode step never is
        self._rows = [w for w, done in enumerate(self._done) if done < len(self._text[w]) - 1][:real]
        read = token_ids[:real].tolist()
        assert read == [self._text[w][self._done[w]] for w in self._rows], "rows are not in the order of windows"
        return self._model.hidden(token_ids, positions, step)

    def logits(self, hidden: Tensor) -> Tensor:
        real = self._model.logits(hidden)
        forced = torch.zeros_like(real)
        for row, window in enumerate(self._rows):
            self._observer(window, self._done[window], real[row])
            self._done[window] += 1
            forced[row, self._text[window][self._done[window]]] = 1.0
        self._on_step()
        return forced
