"""Writing and reading bundles: what is in them, what a reader touches, and what an interruption leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.bundles import (
    Patched,
    digest,
    namespace,
    new_signer,
    payload_of,
    record_of,
    small_chain,
    write_bundle,
)

from kvferry.kvstore import bundle_format as fmt
from kvferry.kvstore.bundle_chain import chain_of, require_same_deployment
from kvferry.kvstore.bundle_errors import BundleDamaged, BundleRefused
from kvferry.kvstore.bundle_reader import BundleReader
from kvferry.kvstore.bundle_writer import BundleWriter
from kvferry.kvstore.errors import BlockCorrupt, InvalidRequest
from kvferry.kvstore.key import block_keys

CHAIN = small_chain(5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_blocks=st.integers(1, 6), num_bytes=st.integers(0, 300), tokens=st.booleans(), signed=st.booleans())
def test_round_trip(tmp_path: Path, num_blocks: int, num_bytes: int, tokens: bool, signed: bool) -> None:
    chain, signer = small_chain(num_blocks), new_signer() if signed else None
    path = tmp_path / "x"
    path.unlink(missing_ok=True)
    write_bundle(path, chain, signer=signer, tokens=tokens, num_bytes=num_bytes)
    with BundleReader(path) as bundle:
        assert bundle.header.chain == (chain if tokens else chain.without_tokens())
        assert bundle.signer == (signer.public_key if signer else None)
        assert [bytes(r.payload) for r in bundle.records()] == [
            payload_of(chain, i, num_bytes) for i in range(num_blocks)
        ]
        assert [bundle.raw_record(i) for i in range(num_blocks)] == [
            record_of(chain, i, num_bytes) for i in range(num_blocks)
        ]
        assert all(row.offset % 64 == 0 for row in bundle.header.rows)
        assert bundle.header.file_bytes == path.stat().st_size
        assert bundle.header.bf16_bytes == num_blocks * 32 * 100


def test_one_chain_is_one_sequence_of_bytes(tmp_path: Path) -> None:
    signer = new_signer()
    first, second = (write_bundle(tmp_path / name, CHAIN, signer=signer).read_bytes() for name in "ab")
    assert first == second
    with BundleReader(tmp_path / "a") as bundle:
        assert first[fmt.PREAMBLE.size :].count(bundle.header.digest) == 1


def test_no_tokens_means_that_they_are_not_in_the_file(tmp_path: Path) -> None:
    raw = array("I", CHAIN.token_ids or []).tobytes()
    assert raw in write_bundle(tmp_path / "with", CHAIN).read_bytes()
    without = write_bundle(tmp_path / "without", CHAIN, tokens=False).read_bytes()
    assert raw[:64] not in without
    with BundleReader(tmp_path / "without") as bundle:
        assert bundle.header.chain.token_ids is None
        assert bundle.header.chain.keys == CHAIN.keys


def test_a_block_is_read_without_the_others(tmp_path: Path) -> None:
    """The other records are destroyed, and nobody notices until they are read."""
    path = write_bundle(tmp_path / "x", CHAIN)
    with BundleReader(path) as bundle:
        row = bundle.header.rows[2]
    content = bytearray(path.read_bytes())
    content[bundle.header.rows[0].offset : row.offset] = b"\xee" * (row.offset - bundle.header.rows[0].offset)
    content[bundle.header.rows[3].offset :] = b"\xee" * (len(content) - bundle.header.rows[3].offset)
    path.write_bytes(content)
    with BundleReader(path) as bundle:
        assert bytes(bundle.record(2).payload) == payload_of(CHAIN, 2)
        for index in (0, 1, 3, 4):
            with pytest.raises(BundleDamaged):
                bundle.record(index)
        for index in (-1, 5):
            with pytest.raises(InvalidRequest):
                bundle.record(index)


def test_a_file_that_changes_while_it_is_open_is_refused(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "x", CHAIN)
    with BundleReader(path) as bundle:
        bundle.record(1)
        file = Patched(path)
        file.flip(bundle.header.rows[1].offset + 130, 3)
        with pytest.raises(BundleDamaged):
            bundle.record(1)
        file.close()
        os.truncate(path, 100)
        with pytest.raises(BundleDamaged, match="too early"):
            bundle.record(1)


def test_only_a_finished_bundle_has_the_name(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with BundleWriter(path, CHAIN) as writer:
        writer.append(record_of(CHAIN, 0))
        with pytest.raises(InvalidRequest, match="4 of 5 records are missing"):
            writer.finish()
    assert not path.exists()
    assert (tmp_path / "x.part").stat().st_mode & 0o777 == 0o600
    with pytest.raises(BundleDamaged):
        BundleReader(tmp_path / "x.part")
    with BundleWriter(path, CHAIN) as writer:
        assert writer.num_done == 1
        for index in range(1, 5):
            writer.append(record_of(CHAIN, index))
        with pytest.raises(InvalidRequest, match="all of its records"):
            writer.append(record_of(CHAIN, 4))
        writer.finish()
    assert os.listdir(tmp_path) == ["x"]
    assert path.read_bytes() == write_bundle(tmp_path / "y", CHAIN).read_bytes()


def test_a_try_without_a_record_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "x", CHAIN):
        assert os.listdir(tmp_path) == ["x.part"]
    assert os.listdir(tmp_path) == []


def test_every_damage_to_a_part_costs_only_the_records_from_there_on(tmp_path: Path) -> None:
    """The finished bundle is the same wherever the half of it was cut or flipped."""
    good = write_bundle(tmp_path / "good", CHAIN).read_bytes()
    path, part = tmp_path / "x", tmp_path / "x.part"
    with BundleWriter(path, CHAIN) as writer:
        for index in range(3):
            writer.append(record_of(CHAIN, index))
    half = part.read_bytes()
    with BundleReader(tmp_path / "good") as bundle:
        ends = [row.offset + row.nbytes for row in bundle.header.rows]
    seen = set()
    damages = [half[:cut] for cut in range(0, len(half) + 1, 7)]
    damages += [half[:at] + bytes([half[at] ^ 1]) + half[at + 1 :] for at in range(0, len(half), 7)]
    for damaged in damages:
        part.write_bytes(damaged)
        with BundleWriter(path, CHAIN, replace=True) as writer:
            done = writer.num_done
            assert done <= sum(end <= len(damaged) for end in ends)
            seen.add(done)
            for index in range(done, 5):
                writer.append(record_of(CHAIN, index))
            writer.finish()
        assert path.read_bytes() == good
    assert seen == {0, 1, 2, 3}


def test_a_part_of_another_chain_is_started_over(tmp_path: Path) -> None:
    other = small_chain(5, first_token=900)
    with BundleWriter(tmp_path / "x", other) as writer:
        writer.append(record_of(other, 0))
    with BundleWriter(tmp_path / "x", CHAIN) as writer:
        assert writer.num_done == 0
        for index in range(5):
            writer.append(record_of(CHAIN, index))
        writer.finish()
    assert (tmp_path / "x").read_bytes() == write_bundle(tmp_path / "y", CHAIN).read_bytes()


def test_killed_while_writing(tmp_path: Path) -> None:
    """A real process, killed at a random moment of a real write, again and again until it has finished."""
    script = (
        "import sys, pathlib\n"
        "from support.bundles import record_of, small_chain\n"
        "from kvferry.kvstore.bundle_writer import BundleWriter\n"
        "chain = small_chain(40)\n"
        "with BundleWriter(pathlib.Path(sys.argv[1]), chain) as writer:\n"
        "    print('from', writer.num_done, flush=True)\n"
        "    for index in range(writer.num_done, 40):\n"
        "        writer.append(record_of(chain, index, 2_000_000))\n"
        "        print(index, flush=True)\n"
        "    writer.finish()\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = dict(os.environ, PYTHONPATH=f"{root / 'src'}:{root / 'tests'}")
    path, starts = tmp_path / "x", []
    for after in (3, 8, 5, 100):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        starts.append(int(process.stdout.readline().split()[1]))
        for _ in range(after):
            if not process.stdout.readline():
                break
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
    assert starts[0] == 0
    assert starts[1] >= 3
    assert starts[2] >= starts[1] + 8
    assert starts[3] >= starts[2] + 5
    chain = small_chain(40)
    with BundleReader(path) as bundle:
        for index, record in enumerate(bundle.records()):
            assert bytes(record.payload) == payload_of(chain, index, 2_000_000)


def test_two_exports_do_not_write_one_file(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "x", CHAIN), pytest.raises(InvalidRequest, match="another export is writing"):
        BundleWriter(tmp_path / "x", CHAIN)
    BundleWriter(tmp_path / "x", CHAIN).close()


def test_what_is_there_stays_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        BundleWriter(path, CHAIN)
    assert path.read_text() == "precious"
    (tmp_path / "y.part").symlink_to(path)
    with pytest.raises(OSError, match="symbolic"):
        BundleWriter(tmp_path / "y", CHAIN)
    assert path.read_text() == "precious"


def test_wrong_records_are_not_written(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "x", CHAIN) as writer:
        for record in (record_of(CHAIN, 1), record_of(small_chain(5, first_token=7), 0), b"no record", b""):
            with pytest.raises(BlockCorrupt):
                writer.append(record)
        assert writer.num_done == 0


def test_chains() -> None:
    assert CHAIN.num_tokens == 160
    assert CHAIN.keys == tuple(block_keys(namespace(), CHAIN.token_ids or []))
    assert CHAIN.until(CHAIN.keys[1]) == small_chain(2)
    with pytest.raises(InvalidRequest, match="none of the chain's 5 blocks"):
        CHAIN.until(digest("no key"))
    other = CHAIN.under_tenant("other")
    assert other == small_chain(5, tenant="other")
    assert not set(other.keys) & set(CHAIN.keys)
    assert CHAIN.under_tenant("tenant") is CHAIN
    with pytest.raises(BundleRefused, match="--no-tokens"):
        CHAIN.without_tokens().under_tenant("other")
    with pytest.raises(InvalidRequest, match="non-empty"):
        CHAIN.under_tenant("")
    with pytest.raises(InvalidRequest, match="less than a block of 32"):
        chain_of(model_name="m", namespace=namespace(), bf16_bytes_per_token=1, token_ids=[1] * 31)
    with pytest.raises(InvalidRequest, match="at most 2097152 tokens"):
        chain_of(
            model_name="m", namespace=namespace(block_size=2048), bf16_bytes_per_token=1, token_ids=[1] * (2**21 + 2048)
        )
    with pytest.raises(InvalidRequest, match="1 to 16384 blocks"):
        chain_of(model_name="m", namespace=namespace(), bf16_bytes_per_token=1, token_ids=[1] * (32 * 16385))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights_digest": digest("x")}, "the model's weights"),
        ({"tokenizer_digest": digest("x")}, "the tokenizer"),
        ({"spec_digest": digest("x")}, "the quantization spec"),
        ({"layout_version": 7}, r"the layout version \(1, not 7\)"),
        ({"numerics_class": digest("x")}, "the numerics class"),
        ({"block_size": 64}, r"the block size \(32, not 64\)"),
        ({"weights_digest": digest("x"), "layout_version": 7}, "the model's weights .*; the layout version"),
    ],
)
def test_another_deployment_is_named_by_what_differs(changes: dict[str, object], words: str) -> None:
    with pytest.raises(BundleRefused, match=words):
        require_same_deployment(CHAIN, model_name="theirs", namespace=namespace(**changes))
    require_same_deployment(CHAIN, model_name="theirs", namespace=namespace(tenant="another"))
