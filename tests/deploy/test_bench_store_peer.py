"""A peer that cannot start says why; the peer itself is no dependency, so its figures are measured by hand."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from kvferry.deploy.bench_store_peer import mooncake_contenders


async def test_an_interpreter_without_the_peers_package_is_named() -> None:
    async with AsyncExitStack() as stack:
        with pytest.raises(RuntimeError, match="No module named 'mooncake'"):
            await mooncake_contenders(stack, Path(sys.executable), 1000, 8)
