"""A request's answers, told apart by their `choice`, on their way from one worker stream to the client."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.deploy.answer import Answer
from kvferry.deploy.errors import BrokenStream
from kvferry.proto import inference_pb2, worker_pb2


class Answers:
    """`Answer.add` for each of the request's `n` answers."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._num_ended_by_worker = 0
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

    def add(self, chunk: worker_pb2.TokenChunk) -> inference_pb2.GenerateChunk | None:
        """The client's chunk for one token; None for one that a stop string has cut off: the other answers go on.
        Raises `BrokenStream`."""
        if chunk.choice >= len(self._answers):
            raise BrokenStream(f"The worker sent a token of answer {chunk.choice}; {len(self._answers)} were due.")
        self._num_ended_by_worker += bool(chunk.finish_reason)
        if chunk.HasField("usage"):
            self.worker_usage = chunk.usage
        answer = self._answers[chunk.choice]
        if answer.finish_reason:
            return None
        out = answer.add(chunk)
        out.choice = chunk.choice
        return out
