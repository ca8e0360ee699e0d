"""What clients send and get, and how it looks on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from kvferry.deploy.client_errors import InvalidRequest, ServerError
from kvferry.proto import inference_pb2


class Message(TypedDict):
    role: str  # "system", "user" or "assistant"
    content: str


class PromptOptions(TypedDict, total=False):
    """What a call is about; exactly one of the argument `prompt`, `messages` and `token_ids` must be given."""

    messages: Sequence[Message]  # a conversation, for the model's chat template
    token_ids: Sequence[int]
    model: str  # the served model
    timeout: float | None  # seconds; without it the gateway's limit applies, 10 minutes if not configured


class Sampling(TypedDict, total=False):
    """How the next token is chosen, and when to stop. What is left out takes the default."""

    max_tokens: int  # 256
    temperature: float  # 0: always the most likely token
    top_p: float  # 1
    top_k: int  # 0: off
    min_p: float  # 0
    seed: int  # random; `usage.seed` tells it
    repetition_penalty: float  # 1
    presence_penalty: float  # 0
    frequency_penalty: float  # 0
    stop: str | Sequence[str]  # the answer ends before the first of these
    stop_token_ids: Sequence[int]
    ignore_eos: bool  # False
    top_logprobs: int  # set: log-probabilities of each token and of this many others
    min_tokens: int  # 0
    n: int  # 1: answers, sampled with `seed`, `seed` + 1, ...


class GenerateOptions(PromptOptions, Sampling, total=False):
    """All keyword arguments of `generate` and `stream`."""

    priority: int  # 0; lower goes first


@dataclass(frozen=True, slots=True)
class Logprob:
    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    chosen: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, taken from the store instead of computed
    ttft_seconds: float
    e2e_seconds: float
    kv_bytes_moved: int  # between processes, for this request
    kv_bytes_bf16: int  # the same crossings with 16-bit K and V
    seed: int
    prefill_compute_seconds: float
    store_fetch_seconds: float
    transfer_seconds: float


@dataclass(frozen=True, slots=True)
class Chunk:
    index: int  # in the answer, of the first of `token_ids`
    text: str  # whole characters; may be empty
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str  # "", and on an answer's last chunk "stop" or "length"
    usage: Usage | None  # on the last chunk of all
    choice: int = 0  # which of the `n` answers; each has indexes of its own


@dataclass(frozen=True, slots=True)
class Choice:
    """One of `n` answers."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" or "length"
    logprobs: tuple[TokenLogprobs, ...]  # one a token, if asked for


@dataclass(frozen=True, slots=True)
class Completion:
    """The first answer, and with `n` the others too."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" or "length"
    usage: Usage  # of all answers together
    logprobs: tuple[TokenLogprobs, ...]  # one a token, if asked for
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class TokenCount:
    tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Warmed:
    prompt_tokens: int
    block_tokens: int  # of these, in complete blocks; only complete blocks are stored
    cached_tokens: int  # taken from the store instead of being computed
    stored_tokens: int  # stored by this call


@dataclass(frozen=True, slots=True)
class Model:
    id: str
    max_model_len: int
    effective_bits: float  # a K or V value in the cache, everything counted
    kernels: str


class ChunkReader:
    """Sees to it that every token comes once, and that every answer has an end."""

    def __init__(self, n: int = 1) -> None:
        self._num_tokens = [0] * max(n, 1)
        self._finished = [False] * max(n, 1)

    def next(self, message: inference_pb2.GenerateChunk) -> Chunk:
        choice = message.choice
        if choice >= len(self._num_tokens):
            raise ServerError(f"The gateway sent answer {choice} where {len(self._num_tokens)} were asked for.")
        due = self._num_tokens[choice]
        if message.index != due or (self._finished[choice] and message.token_ids):
            raise ServerError(f"The gateway sent token {message.index} where token {due} was due.")
        self._num_tokens[choice] += len(message.token_ids)
        self._finished[choice] = bool(message.finish_reason)
        return Chunk(
            choice=choice,
            index=message.index,
            text=message.text,
            token_ids=tuple(message.token_ids),
            logprobs=tuple(_token_logprobs(item) for item in message.logprobs),
            finish_reason=message.finish_reason,
            usage=_usage(message.usage) if message.HasField("usage") else None,
        )

    def end(self) -> None:
        if not all(self._finished):
            raise ServerError(f"The answer broke off after {sum(self._num_tokens)} tokens.")


def generate_request(prompt: str | None, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    _check_names(options, GenerateOptions)
    request = inference_pb2.GenerateRequest(model=options.get("model", ""))
    try:
        request.priority = options.get("priority", 0)
    except (TypeError, ValueError):
        raise InvalidRequest(f"priority cannot be {_short(options.get('priority'))}.") from None
    _set_prompt(request, prompt, options)
    for name in Sampling.__annotations__:
        value = options.get(name)
        if value is None:
            continue
        try:
            if name == "stop":
                request.sampling.stop.extend([value] if isinstance(value, str) else value)  # type: ignore[arg-type]
            elif name == "stop_token_ids":
                request.sampling.stop_token_ids.extend(value)  # type: ignore[arg-type]
            else:
                setattr(request.sampling, name, value)
        except (TypeError, ValueError, OverflowError):
            raise InvalidRequest(f"{name} cannot be {_short(value)}.") from None
    return request


def count_request(prompt: str | None, options: PromptOptions) -> inference_pb2.CountTokensRequest:
    _check_names(options, PromptOptions)
    request = inference_pb2.CountTokensRequest(model=options.get("model", ""))
    _set_prompt(request, prompt, options)
    return request


def warm_request(prompt: str | None, options: PromptOptions) -> inference_pb2.WarmRequest:
    _check_names(options, PromptOptions)
    request = inference_pb2.WarmRequest(model=options.get("model", ""))
    _set_prompt(request, prompt, options)
    return request


def _set_prompt(
    request: inference_pb2.GenerateRequest | inference_pb2.CountTokensRequest | inference_pb2.WarmRequest,
    prompt: str | None,
    options: PromptOptions,
) -> None:
    messages, token_ids = options.get("messages"), options.get("token_ids")
    if sum(value is not None for value in (prompt, messages, token_ids)) != 1:
        raise InvalidRequest("Give exactly one of prompt, messages and token_ids.")
    try:
        if prompt is not None:
            request.text = prompt
        elif messages is not None:
            request.chat.SetInParent()
            for message in messages:
                request.chat.messages.add(role=message["role"], content=message["content"])
        elif token_ids is not None:
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(token_ids)
    except UnicodeEncodeError:
        raise InvalidRequest("The prompt holds lone surrogates, which no UTF-8 text can.") from None
    except (TypeError, ValueError, KeyError):
        raise InvalidRequest(
            "prompt must be a str, messages dicts with a role and a content, token_ids ints that are not negative."
        ) from None


def _check_names(options: GenerateOptions | PromptOptions, known: type) -> None:
    if unknown := options.keys() - known.__annotations__.keys():
        raise TypeError(f"unknown arguments: {', '.join(sorted(unknown))}")


def _short(value: object) -> str:
    return repr(value) if isinstance(value, int | float) else f"a {type(value).__name__}"


def completion(chunks: Sequence[Chunk]) -> Completion:
    last = chunks[-1]
    if last.usage is None:
        raise ServerError("The gateway's last chunk has no usage.")
    choices = tuple(
        _choice([chunk for chunk in chunks if chunk.choice == choice])
        for choice in range(1 + max(chunk.choice for chunk in chunks))
    )
    first = choices[0]
    return Completion(first.text, first.token_ids, first.finish_reason, last.usage, first.logprobs, choices)


def _choice(chunks: Sequence[Chunk]) -> Choice:
    return Choice(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        finish_reason=chunks[-1].finish_reason,
        logprobs=tuple(item for chunk in chunks for item in chunk.logprobs),
    )


def _usage(usage: inference_pb2.Usage) -> Usage:
    return Usage(**{name: getattr(usage, name) for name in Usage.__dataclass_fields__})


def _token_logprobs(item: inference_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(_logprob(item.chosen), tuple(_logprob(top) for top in item.top))


def _logprob(item: inference_pb2.Logprob) -> Logprob:
    return Logprob(item.token_id, item.logprob, item.text)


def token_count(reply: inference_pb2.CountTokensReply) -> TokenCount:
    return TokenCount(reply.tokens, reply.max_model_len)


def warmed(reply: inference_pb2.WarmReply) -> Warmed:
    return Warmed(reply.prompt_tokens, reply.block_tokens, reply.cached_tokens, reply.stored_tokens)


def read_models(reply: inference_pb2.ListModelsReply) -> list[Model]:
    return [Model(m.id, m.max_model_len, m.effective_bits, m.kernels) for m in reply.models]
