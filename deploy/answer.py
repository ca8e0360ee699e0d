"""One request's tokens on their way from the worker to the client: order checked, text made, usage counted."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.deploy.detokenizer import Detokenizer, TokenTexts
from kvferry.deploy.errors import BrokenStream
from kvferry.deploy.stop_strings import StopStrings
from kvferry.proto import inference_pb2, worker_pb2

FINISH_REASONS = ("", "stop", "length")


class Answer:
    """Takes worker chunks in order, gives client chunks; raises `BrokenStream` on any that cannot be right.

    Stop strings are not looked for in the text of the first `min_tokens` - 1 tokens.
    """

    def __init__(
        self,
        *,
        params: worker_pb2.SamplingParams,
        stop: Sequence[str],
        vocab_size: int,
        detokenizer: Detokenizer,
        token_texts: TokenTexts,
    ) -> None:
        self._params = params
        self._vocab_size = vocab_size
        self._detokenizer = detokenizer
        self._stop_strings = StopStrings(stop)
        self._token_texts = token_texts
        self.num_tokens = 0
        self.finish_reason = ""

    def add(self, chunk: worker_pb2.TokenChunk) -> inference_pb2.GenerateChunk:
        """The client's chunk for one token. With `finish_reason`, it is the last; the usage is the caller's to set."""
        self._check(chunk)
        self.num_tokens += 1
        text = self._detokenizer.push([chunk.token_id])
        if chunk.finish_reason:
            text += self._detokenizer.finish()
        text, self.finish_reason = self._stop(text, chunk.finish_reason)
        return inference_pb2.GenerateChunk(
            index=chunk.index,
            text=text,
            token_ids=[chunk.token_id],
            logprobs=[self._logprobs(chunk)] if self._params.logprobs else [],
            finish_reason=self.finish_reason,
        )

    def _stop(self, text: str, finish_reason: str) -> tuple[str, str]:
        if self.num_tokens >= self._params.min_tokens:
            text, stopped = self._stop_strings.push(text)
            if stopped:
                return text, "stop"
        if finish_reason:
            text += self._stop_strings.finish()
        return text, finish_reason

    def _check(self, chunk: worker_pb2.TokenChunk) -> None:
        if chunk.index != self.num_tokens:
            raise BrokenStream(
                f"The worker sent token {chunk.index} where token {self.num_tokens} was due; "
                "the answer ends here, it may not be complete."
            )
        if chunk.index >= self._params.max_tokens:
            raise BrokenStream(f"The worker sent more than max_tokens = {self._params.max_tokens} tokens.")
        if chunk.token_id >= self._vocab_size:
            raise BrokenStream(f"The worker sent an id outside the vocabulary as token {chunk.index}.")
        if chunk.finish_reason not in FINISH_REASONS:
            raise BrokenStream(f"The worker ended with an unknown finish reason at token {chunk.index}.")

    def _logprobs(self, chunk: worker_pb2.TokenChunk) -> inference_pb2.TokenLogprobs:
        return inference_pb2.TokenLogprobs(
            chosen=self._logprob(chunk.token_id, chunk.logprob),
            top=[self._logprob(top.token_id, top.logprob) for top in chunk.top_logprobs],
        )

    def _logprob(self, token_id: int, logprob: float) -> inference_pb2.Logprob:
        return inference_pb2.Logprob(token_id=token_id, logprob=logprob, text=self._token_texts.text(token_id))


def usage_from_worker(usage: worker_pb2.DecodeUsage, *, kv_bytes_per_token_bf16: int) -> inference_pb2.Usage:
    """The part of the client's usage that the workers know. Everything is counted at every crossing."""
    prefill = usage.prefill
    num_tokens_moved = (
        prefill.store_tokens_read + prefill.store_tokens_written + usage.store_tokens_read + usage.handoff_tokens
    )
    return inference_pb2.Usage(
        cached_tokens=prefill.num_cached_tokens,
        kv_bytes_moved=(
            prefill.store_bytes_read + prefill.store_bytes_written + usage.store_bytes_read + usage.handoff_bytes
        ),
        kv_bytes_bf16=num_tokens_moved * kv_bytes_per_token_bf16,
        prefill_compute_seconds=prefill.compute_seconds,
        store_fetch_seconds=prefill.fetch_seconds,
        transfer_seconds=usage.transfer_seconds,
    )
