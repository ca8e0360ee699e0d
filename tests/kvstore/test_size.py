"""Sizes as people write them, for the node's options and for every setting of a deployment."""

from __future__ import annotations

import pytest

from kvferry.kvstore.size import parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("1000000", 1_000_000),
        ("7B", 7),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("512MiB", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("0.5 mib", 2**19),
        ("  2GiB ", 2**31),
        ("1TiB", 2**40),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "0", "1XB", "1.GiB", ".5GiB", "1,5GiB", "5 apples", "5M", "1e9", "0x10", "5MiB 3", "nan"]
)
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)
