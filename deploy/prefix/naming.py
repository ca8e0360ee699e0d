"""Which chain a command is about: that of a prompt, or that of a bundle."""

from __future__ import annotations

import asyncio
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from kvferry.deploy.prefix.deployment import describe
from kvferry.kvstore.bundle_chain import Chain, chain_of
from kvferry.kvstore.bundle_reader import BundleReader
from kvferry.kvstore.errors import InvalidRequest
from kvferry.proto.peer_security import PeerSecurity

MAX_PROMPT_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class PromptName:
    """A prompt as `kvferry generate` would send it."""

    path: Path
    question: str | None = None
    raw: bool = False

    def text(self) -> str:
        """Raises InvalidRequest for what is no text of allowed size, or OSError."""
        try:
            if str(self.path) == "-":
                text = sys.stdin.read(MAX_PROMPT_BYTES + 1)
            else:
                with self.path.open(encoding="utf-8") as file:
                    text = file.read(MAX_PROMPT_BYTES + 1)
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{self.path} is not UTF-8 text") from error
        return f"{text}\n\n{self.question}" if self.question else text


def chain_of_prompt(
    name: PromptName, text: str, *, worker: str, tenant: str, model: str | None, security: PeerSecurity | None = None
) -> Chain:
    """The chain of a prompt in the deployment that `worker` belongs to.

    The prompt is encoded by the code of the gateway, with the tokenizer of the worker's model. Raises InvalidRequest
    when the tokenizer is another one or cannot be found.
    """
    # These load transformers and torch, which takes seconds.
    from kvferry.deploy.causal_lm import UnsupportedModel
    from kvferry.deploy.errors import RequestError
    from kvferry.deploy.models import find_model, load_tokenizer, tokenizer_digest
    from kvferry.deploy.prompt import PromptEncoder
    from kvferry.proto import inference_pb2

    deployment = describe(worker, tenant, security)
    try:
        tokenizer = load_tokenizer(find_model(model or deployment.model_path))
    except (UnsupportedModel, OSError) as error:
        raise InvalidRequest(
            f"the tokenizer of {model or deployment.model_path} cannot be loaded here: name the model's place on this "
            f"machine with --model ({error})"
        ) from error
    if tokenizer_digest(tokenizer) != deployment.namespace.tokenizer_digest:
        raise InvalidRequest(
            f"the tokenizer of {model or deployment.model_path} is not the one of the deployment at {worker}: name the "
            "same model with --model"
        )
    request = inference_pb2.CountTokensRequest()
    if name.raw:
        request.text = text
    else:
        request.chat.messages.add(role="user", content=text)
    encoder = PromptEncoder(tokenizer, vocab_size=len(tokenizer), max_prompt_bytes=MAX_PROMPT_BYTES)
    try:
        token_ids = asyncio.run(encoder.encode(request))
    except RequestError as error:
        raise InvalidRequest(str(error)) from error
    finally:
        encoder.close()
    return chain_of(
        model_name=deployment.model_name,
        namespace=deployment.namespace,
        bf16_bytes_per_token=deployment.bf16_bytes_per_token,
        token_ids=token_ids,
    )


def named_chain(
    *,
    prompt_file: Path | None,
    question: str | None,
    raw: bool,
    chain_of_bundle: Path | None,
    until: str | None,
    worker: str,
    tenant: str,
    model: str | None,
    security: PeerSecurity | None = None,
) -> Chain:
    """The chain that a command's options name. Raises InvalidRequest, BundleDamaged, StoreUnavailable, OSError."""
    if (prompt_file is None) == (chain_of_bundle is None):
        raise InvalidRequest("name the prefix: give either --prompt-file or --chain-of")
    if prompt_file is not None:
        name = PromptName(path=prompt_file, question=question, raw=raw)
        chain = chain_of_prompt(name, name.text(), worker=worker, tenant=tenant, model=model, security=security)
    else:
        assert chain_of_bundle is not None
        with BundleReader(chain_of_bundle) as bundle:
            chain = bundle.header.chain
    return chain if until is None else chain.until(_key(until))


def _key(text: str) -> bytes:
    if re.fullmatch(r"[0-9a-fA-F]{64}", text) is None:
        raise InvalidRequest("a block key is 64 hex digits")
    return bytes.fromhex(text)
