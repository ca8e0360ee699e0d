"""The quantization spec: what a packed value means. Its digest is part of every block key."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

PAGE = 32
"""Tokens of the smallest page."""
CODE_BITS = (2, 4, 8, 16)
GROUP_SIZES = (16, 32, 64, 128)
SCALES = ("fp16", "8bit")
FITS = ("least-squares",)
ROTATIONS = ("none", "hadamard")
BOOST_OF = 16


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """How the keys, or the values, of one layer are stored."""

    bits: int = 2
    """Width of a code: 2, 4 or 8; 16 stands for fp16 without codes, groups and scales."""
    group_size: int = 32
    """Values that share a scale and a zero point: tokens of a channel for K, channels of a token for V."""
    scales: str = "fp16"
    """How scale and zero point are stored: "fp16", two bytes each, or "8bit", one byte each (`scales.py`)."""
    boost: int = 0
    """Of 16 channels of K, how many get two more bits than the others: in every page those of the widest range."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("bits", self.bits, CODE_BITS),
            ("group_size", self.group_size, GROUP_SIZES),
            ("scales", self.scales, SCALES),
        ):
            if value not in known:
                raise ValueError(f"quantization spec: {name} {value!r} is not one of {', '.join(map(str, known))}")
        if self.bits == 8 and self.scales == "8bit":
            raise ValueError('quantization spec: codes of 8 bits need scales of "fp16"')
        if not 0 <= self.boost < BOOST_OF or (self.boost and self.bits > 4):
            raise ValueError(
                f"quantization spec: boost {self.boost} must be between 0 and {BOOST_OF - 1}, and 0 above 4 bits"
            )

    def boosted_channels(self, head_dim: int) -> int:
        """Channels with two more bits: `boost` sixteenths, rounded up to a multiple of 8 (whole words)."""
        return -(-head_dim * self.boost // (BOOST_OF * 8)) * 8


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """K is grouped per channel along tokens, V per token along channels (KIVI, arXiv 2402.02750, section 3)."""

    key: TensorSpec = TensorSpec()
    value: TensorSpec = TensorSpec()

    def __post_init__(self) -> None:
        if self.value.boost:
            raise ValueError("quantization spec: only channels of K can be boosted")

    @property
    def page_tokens(self) -> int:
        """Tokens a page of this layer: one key group, or the smallest page."""
        return max(PAGE, self.key.group_size) if self.key.bits < 16 else PAGE


@dataclass(frozen=True, kw_only=True)
class KVQuantSpec:
    """How K and V of a model are quantized. Every field changes stored bits, so every field is in the digest."""

    layer: LayerSpec = LayerSpec()
    """Every layer that `overrides` does not name."""
    overrides: tuple[tuple[int, LayerSpec], ...] = ()
    """(layer index, its spec), in ascending order."""
    fit: str = "least-squares"
    """How scale and zero point are found; see `reference.fit_groups`."""
    value_rotation: str = "none"
    """"hadamard": V is rotated before it is stored, and attention's output back; see `rotation.py`."""
    sink_tokens: int = 4
    """The first tokens of a sequence, kept in fp16."""
    block_size: int = 128
    """Tokens a block; also the prefill chunk grid (the canonical-block rule)."""

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"quantization spec: fit {self.fit!r} is not one of {', '.join(FITS)}")
        if self.value_rotation not in ROTATIONS:
            raise ValueError(
                f"quantization spec: value_rotation {self.value_rotation!r} is not one of {', '.join(ROTATIONS)}"
            )
        if not 0 <= self.sink_tokens <= 16:
            raise ValueError(f"quantization spec: sink_tokens {self.sink_tokens} must be between 0 and 16")
        indices = [index for index, _ in self.overrides]
        if indices != sorted(set(indices)) or any(index < 0 for index in indices):
            raise ValueError(f"quantization spec: overridden layers {indices} must ascend")
        page = max(layer.page_tokens for layer in (self.layer, *(layer for _, layer in self.overrides)))
        if self.block_size % page or not PAGE <= self.block_size <= 1024:
            raise ValueError(
                f"quantization spec: block_size {self.block_size} must be a multiple of {page} between {PAGE} and 1024"
            )

    def of_layer(self, index: int) -> LayerSpec:
        return dict(self.overrides).get(index, self.layer)

    def digest(self) -> bytes:
        """SHA-256 over the length-prefixed fields. 32 bytes."""
        parts = ["kvferry-spec", f"fit={self.fit}", f"rotation={self.value_rotation}"]
        parts += [f"sinks={self.sink_tokens}", f"block={self.block_size}"]
        for index, layer in ((-1, self.layer), *self.overrides):
            for side, tensor in (("key", layer.key), ("value", layer.value)):
                parts.append(f"{index}.{side}={tensor.bits},{tensor.group_size},{tensor.scales},{tensor.boost}")
        h = hashlib.sha256()
        for part in parts:
            raw = part.encode()
            h.update(len(raw).to_bytes(4, "little") + raw)
        return h.digest()
