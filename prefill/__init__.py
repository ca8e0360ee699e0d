"""Prompt to blocks: canonical prefill, and publishing what it packs."""
