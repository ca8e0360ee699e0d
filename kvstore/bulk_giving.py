"""One put over a bulk connection, at the client."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from kvferry.kvstore.bulk_frames import HEADER, MAX_FAILURE_BYTES, Answer, Kind, encode_put_request, failure
from kvferry.kvstore.bulk_socket import bound_writes, receive_exactly, send_all
from kvferry.kvstore.errors import StoreUnavailable
from kvferry.kvstore.node_answers import PutManyOutcome

_OUTCOMES = {
    Answer.STORED: PutManyOutcome.STORED,
    Answer.EXISTED: PutManyOutcome.EXISTED,
    Answer.FULL: PutManyOutcome.FULL,
    Answer.CORRUPT: PutManyOutcome.CORRUPT,
}


class Given(NamedTuple):
    """What came of the records of a put."""

    outcomes: list[PutManyOutcome]
    message: str
    """Of the node, about one that was refused."""


def give_records(
    connection: socket.socket, records: Sequence[tuple[bytes, bytes]], deadline: float, request_id: str
) -> Given:
    """Puts (key, record) pairs, MAX_RECORDS at most. Blocks; call it in a thread of its own.

    Raises InvalidRequest and StoreUnavailable as the node says, BlockingIOError at the deadline (by `time.monotonic`),
    EOFError and OSError when the connection ends. After any of them it must not be used again.
    """
    bound_writes(connection, deadline - time.monotonic())
    keys, lengths = [key for key, _ in records], [len(record) for _, record in records]
    connection.sendall(encode_put_request(keys, lengths, request_id=request_id))
    answers, message = _answers(connection, len(records), deadline)
    wanted = [index for index, answer in enumerate(answers) if answer is Answer.WANTED]
    if wanted:
        send_all(connection, [records[index][1] for index in wanted])
        later, later_message = _answers(connection, len(wanted), deadline)
        if Answer.WANTED in later:
            raise StoreUnavailable("the node did not say what came of every record")
        for index, answer in zip(wanted, later, strict=True):
            answers[index] = answer
        message = message or later_message
    return Given([_OUTCOMES[answer] for answer in answers], message)


def _answers(connection: socket.socket, count: int, deadline: float) -> tuple[list[Answer], str]:
    num_message_bytes, kind, number = HEADER.unpack(receive_exactly(connection, HEADER.size, deadline))
    if kind in (Kind.UNAVAILABLE, Kind.INVALID) and number <= MAX_FAILURE_BYTES:
        raise failure(kind, receive_exactly(connection, number, deadline))
    if kind != Kind.ANSWERS or number != count or num_message_bytes > MAX_FAILURE_BYTES:
        raise StoreUnavailable("the node answered a put with a frame that is none")
    told = receive_exactly(connection, count + num_message_bytes, deadline)
    try:
        answers = [Answer(value) for value in told[:count]]
    except ValueError as error:
        raise StoreUnavailable("the node answered a put with an answer that is none") from error
    return answers, told[count:].decode(errors="replace")
