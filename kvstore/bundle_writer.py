"""Writes a bundle so that its name never stands for half of one, and so that an interrupted export goes on.

Records go to `NAME.part` one after another, each with its row of the table. When all are there the rest of the head is
written, everything is flushed, and the file gets its name. What a `.part` file holds is not believed but verified: a
record has a checksum and its own key, so what is kept is what a reader would accept for this chain.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from kvferry.kvstore.bundle_chain import Chain, chain_problem
from kvferry.kvstore.bundle_format import ROW, RecordRow, aligned, encode_header, row_offsets
from kvferry.kvstore.bundle_signature import UNSIGNED, Signer
from kvferry.kvstore.codec import decode_record
from kvferry.kvstore.config import DEFAULT_MAX_RECORD_BYTES
from kvferry.kvstore.errors import BlockCorrupt, InvalidRequest
from kvferry.kvstore.key import DIGEST_BYTES


class BundleWriter:
    """One export into `path`. `num_done` records are there already when it is made.

    Holds the `.part` file locked until `close`, which leaves it for the next try; `finish` turns it into the bundle.
    Raises FileExistsError where the bundle is there and `replace` is not set, InvalidRequest where another export
    writes the same file, OSError when the disk refuses.
    """

    def __init__(
        self,
        path: Path,
        chain: Chain,
        *,
        replace: bool = False,
        max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
    ) -> None:
        problem = chain_problem(chain)
        if problem is not None:
            raise InvalidRequest(problem)
        if path.exists() and not replace:
            raise FileExistsError(f"{path} is there already")
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._chain = chain
        self._namespace = chain.namespace.digest()
        self._max_record_bytes = max_record_bytes
        self._rows: list[RecordRow] = []
        self._is_ours = False
        self._table_offset, self._first_offset = row_offsets(chain)
        # Readable by the owner only: K and V tell what the prompt was.
        self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._lock()
            self._recover()
        except BaseException:
            self.close()
            raise

    @property
    def num_done(self) -> int:
        """Records written and verified; the next `append` is of the block with this index."""
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Size of the file so far."""
        return self._rows[-1].offset + self._rows[-1].nbytes if self._rows else self._first_offset

    def append(self, record: bytes) -> None:
        """Writes the next block's record. Raises BlockCorrupt when it is not that."""
        index = self.num_done
        if index == len(self._chain.keys):
            raise InvalidRequest("the bundle has all of its records")
        self._check(index, record)
        row = RecordRow(self._next_offset(), len(record), hashlib.sha256(record).digest())
        self._write(row.offset, record)
        self._write(
            self._table_offset + index * ROW.size,
            ROW.pack(self._chain.keys[index], row.offset, row.nbytes, row.sha256),
        )
        self._rows.append(row)

    def finish(self, signer: Signer | None = None) -> bytes:
        """Gives the complete file its name; it is on disk when this returns. Returns the bundle's digest.

        Raises InvalidRequest while records are missing.
        """
        missing = len(self._chain.keys) - self.num_done
        if missing:
            raise InvalidRequest(
                f"{missing} of {len(self._chain.keys)} records are missing; the bundle is not finished"
            )
        signed = encode_header(self._chain, self._rows)
        head = signed + (UNSIGNED if signer is None else signer.sign(signed))
        self._write(0, head + bytes(self._first_offset - len(head)))
        os.ftruncate(self._file, self.nbytes)
        os.fsync(self._file)
        os.rename(self._part, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.close()
        return signed[-DIGEST_BYTES:]  # the header ends with it

    def close(self) -> None:
        """Lets go of the file; the records written stay in `.part`, which is removed where there are none. Safe to
        call twice."""
        if self._file >= 0:
            if self._is_ours and not self._rows:
                self._part.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidRequest(f"another export is writing {self._part}") from error
        # It may have finished between our open and our lock; then the file that we hold is its bundle.
        try:
            ours = os.path.samestat(os.fstat(self._file), os.stat(self._part, follow_symlinks=False))
        except FileNotFoundError:
            ours = False
        if not ours:
            raise InvalidRequest(f"another export has just finished {self._path}")
        self._is_ours = True

    def _recover(self) -> None:
        """Keeps the leading records of a `.part` file that are this chain's, and cuts off what follows."""
        for index, key in enumerate(self._chain.keys):
            raw = os.pread(self._file, ROW.size, self._table_offset + index * ROW.size)
            if len(raw) < ROW.size:
                break
            row_key, offset, nbytes, sha256 = ROW.unpack(raw)
            if row_key != key or offset != self._next_offset() or not 1 <= nbytes <= self._max_record_bytes:
                break
            record = self._read(offset, nbytes)
            if hashlib.sha256(record).digest() != sha256:
                break
            try:
                self._check(index, record)
            except BlockCorrupt:
                break
            self._write(self.nbytes, bytes(offset - self.nbytes))  # no checksum covers the gap before it
            self._rows.append(RecordRow(offset, nbytes, sha256))
        os.ftruncate(self._file, self.nbytes)

    def _next_offset(self) -> int:
        return aligned(self.nbytes)

    def _check(self, index: int, record: bytes) -> None:
        header = decode_record(
            record,
            expected_key=self._chain.keys[index],
            expected_namespace=self._namespace,
            max_record_bytes=self._max_record_bytes,
        ).header
        if header.block_index != index or header.num_tokens != self._chain.namespace.block_size:
            raise BlockCorrupt(f"the record says that it is block {header.block_index}, not {index}")

    def _read(self, offset: int, nbytes: int) -> bytes:
        """These bytes, or fewer where the file ends."""
        parts: list[bytes] = []
        while nbytes and (part := os.pread(self._file, nbytes, offset)):
            parts.append(part)
            offset, nbytes = offset + len(part), nbytes - len(part)
        return b"".join(parts)

    def _write(self, offset: int, content: bytes) -> None:
        view = memoryview(content)
        while view.nbytes:
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written
