"""The demo model with its contexts divided between two ranks, from the client to the tokens."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.assembly import make_gateway
from kvferry.deploy.client import AsyncClient
from kvferry.deploy.settings import Settings
from kvferry.deploy.spec_file import resolve_spec
from kvferry.deploy.worker_server import ModelConfig, ModelRuntime

BLOCK_SIZE = 128
TEXT = "Decode workers keep a block pool. A block holds the keys and values of its tokens. " * 60
BLOCKS_OF_A_RANK = 6


@pytest.mark.deep
async def test_a_prompt_that_one_rank_cannot_hold(serve_workers: Any) -> None:
    """Gateway, a prefill worker of one rank, and decode workers of one rank with all the memory, of two ranks with a
    share each, and of one rank with such a share, which refuses."""
    spec = resolve_spec("kv2", block_size=BLOCK_SIZE)
    config = ModelConfig(model="demo", spec=spec, dtype="float32")
    one = ModelRuntime(config, on_ranks_lost=pytest.fail)
    two = ModelRuntime(ModelConfig(**vars(config) | {"context_parallel": 2}), on_ranks_lost=pytest.fail)
    share = BLOCKS_OF_A_RANK * one.layout.block_bytes
    settings = Settings.load(model="demo", gateway={"port": 0})
    messages = [{"role": "user", "content": TEXT + "What does a block hold?"}]
    answers: list[Any] = []
    try:
        for runtime, kv_memory in ((one, 2 * share), (two, 2 * share), (one, share)):
            decode = DecodeConfig(kv_memory=kv_memory, max_num_seqs=4)
            workers = await serve_workers(one, None, decode, decode_runtime=runtime)
            gateway = await make_gateway(settings, prefill=[workers.prefill_address], decode=[workers.decode_address])
            port = await gateway.start()
            await gateway.wait_until_serving(60)
            async with AsyncClient(f"127.0.0.1:{port}") as client:
                if kv_memory == share:
                    with pytest.raises(Exception, match="blocks and this worker's pool has 6"):
                        await client.generate(messages=messages, max_tokens=24)
                else:
                    answers.append(await client.generate(messages=messages, max_tokens=24))
            await gateway.stop(0.2)
    finally:
        two.close()
        one.close()
    assert BLOCKS_OF_A_RANK * BLOCK_SIZE < answers[0].usage.prompt_tokens < 2 * BLOCKS_OF_A_RANK * BLOCK_SIZE
    assert answers[0].token_ids == answers[1].token_ids
    assert len(answers[0].token_ids) == 24
