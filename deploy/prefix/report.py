"""What is printed about a bundle."""

from __future__ import annotations

from collections.abc import Mapping

from kvferry.kvstore.bundle_reader import BundleReader


def shown(text: str) -> str:
    """Text of a file that nobody vouches for, without what would steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def size_words(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB" if num_bytes >= 10_000 else f"{num_bytes} bytes"


def signer_words(signer: bytes | None, trusted: Mapping[bytes, str]) -> str:
    if signer is None:
        return "nobody: an import will refuse it without --insecure-accept-unsigned"
    if signer in trusted:
        return f"{signer.hex()} ({trusted[signer] or 'no name'}), trusted here"
    return f"{signer.hex()}, not trusted here"


def describe_bundle(bundle: BundleReader, trusted: Mapping[bytes, str]) -> list[tuple[str, str]]:
    """Names and values, of the head alone."""
    header = bundle.header
    chain, namespace = header.chain, header.chain.namespace
    ratio = f", {header.bf16_bytes / header.file_bytes:.2f} times the file" if header.bf16_bytes else ""
    return [
        ("digest", header.digest.hex()),
        ("model", shown(chain.model_name)),
        ("weights", namespace.weights_digest.hex()),
        ("tokenizer", namespace.tokenizer_digest.hex()),
        ("spec", namespace.spec_digest.hex()),
        ("layout version", str(namespace.layout_version)),
        ("numerics class", namespace.numerics_class.hex()),
        ("tenant", shown(namespace.tenant)),
        ("tokens", f"{chain.num_tokens:,} in {len(chain.keys)} blocks of {namespace.block_size}"),
        ("token ids", "kept back" if chain.token_ids is None else "in the bundle; the block keys are theirs"),
        ("last block key", chain.keys[-1].hex()),
        ("file", size_words(header.file_bytes)),
        ("bf16", f"{size_words(header.bf16_bytes)} for the same tokens{ratio}"),
        ("signed by", signer_words(bundle.signer, trusted)),
    ]
