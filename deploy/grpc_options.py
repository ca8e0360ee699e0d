"""Channel and server options: dead peers are found within about 3 s, and lost peers are found again within 1 s.

gRPC's own defaults let a call wait for its deadline when the peer is gone without a word. A server must allow the
pings of its clients, else it ends the connection with `too_many_pings`; so worker servers need `server_options` too.
"""

from __future__ import annotations

Options = list[tuple[str, str | int]]

KEEPALIVE_TIME_MS = 1_000
KEEPALIVE_TIMEOUT_MS = 2_000


def channel_options(*, max_receive_bytes: int = 4 * 2**20) -> Options:
    return [
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 0),
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
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 200),
        # On a busy machine pings arrive in bunches; by default the server answers that with `too_many_pings`.
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
        ("grpc.max_receive_message_length", max_receive_bytes),
    ]
