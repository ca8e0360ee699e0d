"""Trailing metadata of a refused request."""

ERROR_KEY = "kvferry-error"  # the class in errors.py; absent when gRPC itself made the error
RETRY_AFTER_KEY = "retry-after-ms"
