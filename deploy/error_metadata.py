"""Trailing metadata of a refused request."""

from kvferry.proto.trailing_metadata import RETRY_AFTER_KEY

__all__ = ["ERROR_KEY", "RETRY_AFTER_KEY"]

ERROR_KEY = "kvferry-error"  # the class in errors.py; absent when gRPC itself made the error
