"""Trailing metadata that workers and gateway both know."""

RETRY_AFTER_KEY = "retry-after-ms"
"""With RESOURCE_EXHAUSTED: when another try may find room, in decimal digits."""
