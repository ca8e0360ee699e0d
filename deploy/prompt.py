"""A request's prompt to token ids. Bytes are limited before anything is tokenized."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeAlias

from kvferry.deploy.detokenizer import Decoder
from kvferry.deploy.errors import (
    EmptyPrompt,
    InvalidRequest,
    NoChatTemplate,
    PromptNotUnicode,
    PromptTooLong,
    TokenIdOutOfVocabulary,
    UnknownRole,
)
from kvferry.proto import inference_pb2

ROLES = ("system", "user", "assistant")
MAX_CHAT_MESSAGES = 4096  # each adds its share of the chat template
TOKEN_ID_BYTES = 4

PromptRequest: TypeAlias = inference_pb2.GenerateRequest | inference_pb2.CountTokensRequest | inference_pb2.WarmRequest


class Tokenizer(Decoder, Protocol):
    """The part of a transformers tokenizer that the gateway needs."""

    @property
    def chat_template(self) -> object: ...

    def encode(self, text: str) -> list[int]: ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool,
        return_dict: bool,
    ) -> list[int]: ...


class PromptEncoder:
    """Tokenizes in its own threads, so that the event loop goes on. `close` ends them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        max_prompt_bytes: int,
        num_threads: int = 2,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_prompt_bytes = max_prompt_bytes
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")
        # The first call settles the backend's truncation and padding; later ones only read, from any thread.
        tokenizer.encode("")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check(self, request: PromptRequest) -> None:
        """Everything that can be checked without tokenizing. Cheap."""
        match request.WhichOneof("prompt"):
            case "text":
                if not request.text:
                    raise EmptyPrompt("The prompt is empty.")
                self._check_size(_num_bytes(request.text, "text"))
            case "chat":
                self._check_chat(request.chat)
            case "token_ids":
                self._check_token_ids(request.token_ids)
            case _:
                raise EmptyPrompt("The request has no prompt: set text, chat or token_ids.")

    async def encode(self, request: PromptRequest) -> list[int]:
        """The prompt's token ids, after `check`. Text gets the model's start token if it has one."""
        self.check(request)
        match request.WhichOneof("prompt"):
            case "token_ids":
                return list(request.token_ids.ids)
            case "chat":
                token_ids = await self._in_thread(lambda: self._encode_chat(request.chat))
            case _:
                token_ids = await self._in_thread(lambda: self._tokenizer.encode(request.text))
        if not token_ids:
            raise EmptyPrompt("The prompt has no tokens.")
        return token_ids

    def _encode_chat(self, chat: inference_pb2.ChatMessages) -> list[int]:
        conversation = [{"role": m.role, "content": m.content} for m in chat.messages]
        try:
            return self._tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            # Its text may quote the conversation.
            roles = ", ".join(m.role for m in chat.messages[:8])
            more = ", ..." if len(chat.messages) > 8 else ""
            raise InvalidRequest(
                f"The model's chat template refuses this conversation (roles in order: {roles}{more})."
            ) from None

    async def _in_thread(self, encode: Callable[[], list[int]]) -> list[int]:
        def guarded() -> list[int]:
            try:
                return encode()
            except InvalidRequest:
                raise
            except BaseException as error:  # a panic in the Rust tokenizer is no Exception
                raise RuntimeError(f"the tokenizer failed with {type(error).__name__}") from None

        return await asyncio.get_running_loop().run_in_executor(self._threads, guarded)

    def _check_chat(self, chat: inference_pb2.ChatMessages) -> None:
        if not chat.messages:
            raise EmptyPrompt("The conversation has no messages.")
        if not self._tokenizer.chat_template:
            raise NoChatTemplate("This model has no chat template; send text or token_ids.")
        if len(chat.messages) > MAX_CHAT_MESSAGES:
            raise PromptTooLong(
                f"The conversation has {len(chat.messages):,} messages; at most {MAX_CHAT_MESSAGES:,} are accepted."
            )
        num_bytes = 0
        for index, message in enumerate(chat.messages):
            if message.role not in ROLES:
                raise UnknownRole(f"chat.messages[{index}].role is none of {', '.join(ROLES)}.")
            num_bytes += _num_bytes(message.content, f"chat.messages[{index}].content")
        self._check_size(num_bytes)

    def _check_token_ids(self, token_ids: inference_pb2.TokenIds) -> None:
        if not token_ids.ids:
            raise EmptyPrompt("The prompt is empty.")
        self._check_size(TOKEN_ID_BYTES * len(token_ids.ids))
        if max(token_ids.ids) >= self._vocab_size:
            index = next(i for i, t in enumerate(token_ids.ids) if t >= self._vocab_size)
            raise TokenIdOutOfVocabulary(
                f"token_ids[{index}] is {token_ids.ids[index]}; allowed: 0 to {self._vocab_size - 1}."
            )

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_prompt_bytes:
            raise PromptTooLong(f"The prompt has {num_bytes:,} bytes; at most {self._max_prompt_bytes:,} are accepted.")


def _num_bytes(text: str, field: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise PromptNotUnicode(f"{field} holds lone surrogates, which no UTF-8 text can.") from None
