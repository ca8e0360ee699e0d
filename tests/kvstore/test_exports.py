"""The public surface, and what the package must never import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kvferry.kvstore as kvstore
from kvferry.kvstore.errors import KVStoreError
from kvferry.kvstore.interceptor import STATUS_CODES
from kvferry.kvstore.malloc import tune_malloc


def test_all_is_sorted_and_complete() -> None:
    assert kvstore.__all__ == sorted(kvstore.__all__)
    assert all(hasattr(kvstore, name) for name in kvstore.__all__)


def test_every_error_has_a_status() -> None:
    assert set(STATUS_CODES) == set(KVStoreError.__subclasses__())
    assert len(set(STATUS_CODES.values())) == len(STATUS_CODES)


def test_no_heavy_or_unsafe_imports() -> None:
    code = (
        "import sys, kvferry.kvstore.redis_backend, kvferry.kvstore.__main__;"
        "print([m for m in ('torch', 'ray', 'transformers', 'triton') if m in sys.modules])"
    )
    root = Path(kvstore.__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(root / "src")},
    )
    assert done.stdout.strip() == "[]", done.stderr
    for source in Path(kvstore.__file__).parent.glob("*.py"):
        text = source.read_text()
        assert "import pickle" not in text and "eval(" not in text, source


def test_tuning_malloc_works_or_says_so() -> None:
    code = "from kvferry.kvstore.malloc import tune_malloc; print(tune_malloc())"
    root = Path(kvstore.__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(root / "src")},
    )
    assert done.stdout.strip() in ("True", "False"), done.stderr
    assert callable(tune_malloc)
