"""Options of every channel and server: dead peers are found within about 3 s, and lost ones found again within 1 s.

gRPC's own defaults let a call wait for its deadline when the peer is gone without a word. A server must allow the
pings of its clients, else it ends the connection with `too_many_pings`; so every server needs `server_options`.

`keepalive_timeout_ms` alone does nothing (grpcio 1.85: a peer that is stopped was not noticed in 12 s; see
https://github.com/grpc/grpc/pull/39239): the answer to a ping is awaited for `ping_timeout_ms`, 60 s by default. With
both set the same peer is given up, also while other calls on the channel keep writing: a silent connection is asked 1 s
after the last byte (gRPC 1.85 takes no shorter time), a busy one earlier.
"""

from __future__ import annotations

Options = list[tuple[str, str | int]]

KEEPALIVE_TIME_MS = 1_000
KEEPALIVE_TIMEOUT_MS = 1_700
"""With the second above: 2.7 s, so that 3 s hold on a machine that is late by 0.3 s."""


def channel_options(*, max_receive_bytes: int = 4 * 2**20, ping_while_idle: bool = False) -> Options:
    """`ping_while_idle` finds a silent peer before the next call does, for a ping a second."""
    return [
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", int(ping_while_idle)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.enable_http_proxy", 0),
        ("grpc.max_receive_message_length", max_receive_bytes),
    ]


def server_options(*, max_receive_bytes: int = 4 * 2**20) -> Options:
    return [
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 200),
        # On a busy machine pings arrive in bunches; by default the server answers that with `too_many_pings`.
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
        ("grpc.max_receive_message_length", max_receive_bytes),
    ]
