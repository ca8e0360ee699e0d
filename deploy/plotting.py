"""Plots are an extra."""

from __future__ import annotations

import importlib.util


def require_matplotlib() -> None:
    """Raises ValueError, which says how to install it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib: pip install 'kvferry[bench]'")
