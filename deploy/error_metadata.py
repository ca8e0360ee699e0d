"""Metadata by which a client tells what became of its request."""

from kvferry.proto.trailing_metadata import RETRY_AFTER_KEY

__all__ = ["ACCEPTED_KEY", "ERROR_KEY", "RETRY_AFTER_KEY"]

ERROR_KEY = "kvferry-error"  # the class in errors.py; absent when gRPC itself made the error
ACCEPTED_KEY = "kvferry-accepted"  # sent at once: who has it and loses the connection was talking to a gateway
