"""Block keys against an independent implementation, and every field against every other."""

from __future__ import annotations

import dataclasses
import hashlib
import time

import pytest

from kvferry.kvstore import Namespace, block_keys


def _field(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


def _independent_namespace_digest(n: Namespace) -> bytes:
    text = _field(b"kvferry/namespace/1")
    text += _field(bytes(n.tenant, "utf-8"))
    text += _field(n.weights_digest)
    text += _field(n.tokenizer_digest)
    text += _field(n.spec_digest)
    text += _field(n.layout_version.to_bytes(8, "little"))
    text += _field(n.numerics_class)
    text += _field(n.block_size.to_bytes(8, "little"))
    return hashlib.sha256(text).digest()


def _independent_keys(n: Namespace, tokens: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    for number in range(len(tokens) // n.block_size):
        block = tokens[number * n.block_size :][: n.block_size]
        text = _field(b"kvferry/block-key/1") + _field(_independent_namespace_digest(n))
        text += _field(keys[-1] if keys else b"root")
        text += _field(number.to_bytes(8, "little"))
        text += _field(b"".join(token.to_bytes(4, "little") for token in block))
        keys.append(hashlib.sha256(text).digest())
    return keys


# Change these only together with a format magic in key.py: stores out there hold such keys.
_GOLDEN_NAMESPACE = "9cb6db35425cc5e19a24b2b464be1602f29460ca24d370253f391a7f6df76366"
_GOLDEN_KEYS = [
    "e62e6b12808b0206baac6cde3f3379ec489cf989d71f5e6e75709a538f5742df",
    "1f535459804faca116d94ba3b2c948828a3ec603967b2480733076777c1f1a35",
]


def test_golden_vectors(namespace: Namespace) -> None:
    assert namespace.digest().hex() == _GOLDEN_NAMESPACE
    assert [key.hex() for key in block_keys(namespace, range(64))] == _GOLDEN_KEYS


@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 63, 64, 1000])
def test_keys_equal_the_independent_implementation(namespace: Namespace, num_tokens: int) -> None:
    tokens = [(token * 2654435761) % (1 << 32) for token in range(num_tokens)]
    assert namespace.digest() == _independent_namespace_digest(namespace)
    keys = block_keys(namespace, tokens)
    assert keys == _independent_keys(namespace, tokens)
    assert len(keys) == num_tokens // 32
    assert all(len(key) == 32 for key in keys)


_CHANGES = {
    "tenant": "tenant2",
    "weights_digest": bytes(32),
    "tokenizer_digest": bytes(32),
    "spec_digest": bytes(32),
    "layout_version": 2,
    "numerics_class": bytes(32),
    "block_size": 64,
}


def test_every_field_has_a_change() -> None:
    assert set(_CHANGES) == {field.name for field in dataclasses.fields(Namespace)}


@pytest.mark.parametrize("name", sorted(_CHANGES))
def test_a_changed_field_changes_digest_and_keys(namespace: Namespace, name: str) -> None:
    changed = dataclasses.replace(namespace, **{name: _CHANGES[name]})
    assert dataclasses.replace(namespace).digest() == namespace.digest()
    assert changed.digest() != namespace.digest()
    tokens = list(range(128))
    assert not set(block_keys(changed, tokens)) & set(block_keys(namespace, tokens))


def test_no_two_digest_fields_are_interchangeable(namespace: Namespace) -> None:
    names = ("weights_digest", "tokenizer_digest", "spec_digest", "numerics_class")
    seen = {namespace.digest()}
    for first in names:
        for second in names:
            if first < second:
                swapped = dataclasses.replace(
                    namespace,
                    **{first: getattr(namespace, second), second: getattr(namespace, first)},
                )
                seen.add(swapped.digest())
    assert len(seen) == 7


def test_field_boundaries(namespace: Namespace) -> None:
    """Bytes that move from one field to its neighbour make another namespace."""
    pairs = [
        (dict(tenant="org_1"), dict(tenant="org_12345")),
        (dict(layout_version=1, block_size=32), dict(layout_version=32, block_size=1)),
        (dict(layout_version=256), dict(layout_version=1)),
        (dict(tenant="a" + "\0" * 8), dict(tenant="a")),
    ]
    for left, right in pairs:
        one, other = dataclasses.replace(namespace, **left), dataclasses.replace(namespace, **right)
        assert one.digest() != other.digest()
    tail_in_tenant = dataclasses.replace(namespace, tenant="a" + "b" * 32, weights_digest=b"b" * 31 + b"c")
    tail_in_digest = dataclasses.replace(namespace, tenant="a" + "b" * 31, weights_digest=b"b" * 32)
    assert tail_in_tenant.digest() != tail_in_digest.digest()


def test_keys_are_chained(namespace: Namespace) -> None:
    tokens = list(range(128))
    keys = block_keys(namespace, tokens)
    for changed in range(128):
        other = block_keys(namespace, [*tokens[:changed], 999, *tokens[changed + 1 :]])
        block = changed // 32
        assert other[:block] == keys[:block]
        assert not set(other[block:]) & set(keys)


def test_equal_blocks_at_other_places_have_other_keys(namespace: Namespace) -> None:
    keys = block_keys(namespace, [7] * 320)
    assert len(set(keys)) == 10


def test_incomplete_last_block_has_no_key(namespace: Namespace) -> None:
    assert block_keys(namespace, [1] * 63) == block_keys(namespace, [1] * 32)


@pytest.mark.parametrize("token", [-1, 1 << 32, 1.5, "1", None])
def test_bad_tokens_are_refused(namespace: Namespace, token: object) -> None:
    with pytest.raises(ValueError, match="token ids"):
        block_keys(namespace, [token])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": ""},
        {"tenant": "x" * 1025},
        {"tenant": b"bytes"},
        {"tenant": "\ud800"},
        {"weights_digest": b"short"},
        {"tokenizer_digest": bytes(33)},
        {"spec_digest": "0" * 32},
        {"numerics_class": b""},
        {"layout_version": -1},
        {"layout_version": 1 << 32},
        {"layout_version": True},
        {"block_size": 0},
        {"block_size": 32.0},
    ],
)
def test_bad_namespaces_are_refused(namespace: Namespace, change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        dataclasses.replace(namespace, **change)  # type: ignore[arg-type]


def test_long_prompts_are_fast(namespace: Namespace) -> None:
    tokens = list(range(100_000))
    start = time.process_time()
    assert len(block_keys(namespace, tokens)) == 3125
    # 0.04 s on the machine this was written on; a bound on a mistake, not a benchmark.
    assert time.process_time() - start < 1.0
