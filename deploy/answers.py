"""A request's answers, told apart by their `choice`, on their way from the workers to the client."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.deploy.answer import Answer
from kvferry.deploy.errors import BrokenStream
from kvferry.deploy.received import Received, ReceivedCheck
from kvferry.proto import inference_pb2, worker_pb2


class Answers:
    """`Answer.add` for each of the request's `n` answers.

    A worker's stream may break off and another worker's begin again at token 0: a token depends on the prompt, the
    parameters and the seed alone, so what the client has is passed over, and checked on the way. The same goes for
    what the client had before it came to this gateway.
    """

    def __init__(self, answers: Sequence[Answer], received: Sequence[Received] = ()) -> None:
        """`received`: by answer, what the client has."""
        self._answers = answers
        self._received = [ReceivedCheck(told) for told in received]
        self._sent: list[list[int]] = [[] for _ in answers]
        """By answer: the tokens that any worker has sent."""
        self._position = [0] * len(answers)
        """By answer: how many tokens the current worker has sent."""
        self._num_ended_by_worker = 0
        self._attempt = 0
        self.num_stale = 0
        """Chunks of an attempt that was over, dropped."""
        self.worker_usage = worker_pb2.DecodeUsage()

    @property
    def num_tokens(self) -> int:
        """Of all answers together."""
        return sum(answer.num_tokens for answer in self._answers)

    @property
    def finished(self) -> bool:
        """Every answer has its last chunk."""
        return all(answer.finish_reason for answer in self._answers)

    @property
    def ended_by_worker(self) -> bool:
        """The worker has sent the last token of every answer."""
        return self._num_ended_by_worker == len(self._answers)

    def start_worker(self, attempt: int = 0) -> None:
        """A worker begins with the first token of every answer. Chunks that name another attempt are dropped."""
        self._attempt = attempt
        self._position = [0] * len(self._answers)
        self._num_ended_by_worker = 0

    def add(self, chunk: worker_pb2.TokenChunk) -> inference_pb2.GenerateChunk | None:
        """The client's chunk for one token; None for one that the client has, or that a stop string has cut off.
        Raises `BrokenStream`."""
        if chunk.attempt and chunk.attempt != self._attempt:
            self.num_stale += 1
            return None
        if chunk.choice >= len(self._answers):
            raise BrokenStream(f"The worker sent a token of answer {chunk.choice}; {len(self._answers)} were due.")
        self._num_ended_by_worker += bool(chunk.finish_reason)
        if chunk.HasField("usage"):
            self.worker_usage = chunk.usage
        answer, sent, position = self._answers[chunk.choice], self._sent[chunk.choice], self._position[chunk.choice]
        if position < len(sent):
            self._check_repeated(chunk, sent, position)
            self._position[chunk.choice] += 1
            return None
        if answer.finish_reason:
            return None
        out = answer.add(chunk)
        sent.append(chunk.token_id)
        self._position[chunk.choice] += 1
        out.choice = chunk.choice
        if not self._client_has(chunk.choice, chunk.token_id, is_last=bool(answer.finish_reason)):
            return out
        if self.finished:  # only the usage is new
            return inference_pb2.GenerateChunk(
                choice=chunk.choice, index=chunk.index + 1, finish_reason=answer.finish_reason
            )
        return None

    def _client_has(self, choice: int, token_id: int, *, is_last: bool) -> bool:
        """Whether the client had the token when it came. Raises `BrokenStream` when it had another one."""
        if choice >= len(self._received) or self._received[choice].is_over:
            return False
        check = self._received[choice]
        if not check.add(token_id) or (is_last and not check.is_over):
            raise BrokenStream(
                "The answer that was computed again is not the one that the client has a part of; it ends here."
            )
        return True

    @staticmethod
    def _check_repeated(chunk: worker_pb2.TokenChunk, sent: list[int], position: int) -> None:
        if (chunk.index, chunk.token_id) != (position, sent[position]):
            raise BrokenStream(
                f"The first worker was lost, and another one has another token {position}; the answer ends here."
            )
