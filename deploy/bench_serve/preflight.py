"""Whether a workload can be served at all, asked before it starts."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from kvferry.deploy.bench_serve.workload import PlannedRequest
from kvferry.deploy.client import AsyncClient, InvalidRequest, Model

_TIMEOUT_S = 10.0


async def find_model(client: AsyncClient, name: str | None) -> Model:
    """The served model. Raises ValueError, or ClientError when nobody answers."""
    models = await client.models(timeout=_TIMEOUT_S)
    if not models:
        raise ValueError("the gateway serves no model now: its workers are not ready")
    for model in models:
        if name in (None, model.id):
            return model
    raise ValueError(f"--model {name}: the gateway serves {', '.join(model.id for model in models)}")


def check_window(requests: Sequence[PlannedRequest], model: Model) -> None:
    """Raises ValueError if a request that is meant to complete needs more tokens than the model holds."""
    lengths = [
        (len(request.token_ids), request.max_tokens)
        for request in requests
        if request.expected is not grpc.StatusCode.INVALID_ARGUMENT
    ]
    prompt, answer = max(lengths, key=sum, default=(0, 0))
    if prompt + answer > model.max_model_len:
        raise ValueError(
            f"a prompt of {prompt:,} tokens and an answer of {answer:,} do not fit the window of {model.id}, "
            f"{model.max_model_len:,} tokens"
        )


async def check_vocabulary(client: AsyncClient, vocab_size: int) -> None:
    """Raises ValueError if the gateway does not know all ids that prompts are made of."""
    try:
        await client.count_tokens(token_ids=[vocab_size - 1], timeout=_TIMEOUT_S)
    except InvalidRequest as error:
        raise ValueError(f"--vocab-size {vocab_size} is too large for this model: {error}") from None
