"""Reads a bundle from a place that nobody vouches for. Touches the head and the records asked for, nothing else."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from kvferry.kvstore.bundle_errors import BundleDamaged
from kvferry.kvstore.bundle_format import (
    PREAMBLE,
    SIGNATURE_BYTES,
    BundleHeader,
    decode_header,
    head_bytes,
    read_preamble,
)
from kvferry.kvstore.bundle_signature import signer_of
from kvferry.kvstore.codec import Record, decode_record
from kvferry.kvstore.config import DEFAULT_MAX_RECORD_BYTES
from kvferry.kvstore.errors import BlockCorrupt, InvalidRequest


class BundleReader:
    """An open bundle. Its head is verified when it is made, each record when it is read.

    Raises BundleDamaged for anything that is not a valid bundle, OSError when the file cannot be read. Every record is
    verified in the buffer that is returned, so a file that changes meanwhile is refused or read as it was.
    """

    def __init__(self, path: Path, *, max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES) -> None:
        self._max_record_bytes = max_record_bytes
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(self._file)
            if not stat.S_ISREG(status.st_mode):
                raise BundleDamaged(f"{path} is not a regular file")
            self.header, self.signer = self._read_head(status.st_size)
            """`signer`: the public key whose valid signature the bundle bears, or None."""
        except BaseException:
            self.close()
            raise

    def record(self, index: int) -> Record:
        """The verified record of block `index`; reads its bytes and the zeros after it. Raises InvalidRequest for an
        index that there is not, BundleDamaged for bytes that are not the record."""
        return self._verified(index, self._record_bytes(index))

    def raw_record(self, index: int) -> bytes:
        """The verified bytes of the record of block `index`, as a store keeps them. Raises like `record`."""
        buffer = self._record_bytes(index)
        self._verified(index, buffer)
        return buffer

    def records(self, start: int = 0) -> Iterator[Record]:
        """The verified records from block `start` on, one in memory at a time."""
        for index in range(start, len(self.header.rows)):
            yield self.record(index)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read_head(self, file_bytes: int) -> tuple[BundleHeader, bytes | None]:
        preamble = self._read(0, min(PREAMBLE.size, file_bytes))
        signed_bytes = PREAMBLE.size + read_preamble(preamble, file_bytes)
        head = self._read(0, head_bytes(signed_bytes))
        signed, signature = head[:signed_bytes], head[signed_bytes : signed_bytes + SIGNATURE_BYTES]
        header = decode_header(signed, max_record_bytes=self._max_record_bytes)
        if any(head[signed_bytes + SIGNATURE_BYTES :]):
            raise BundleDamaged("the bytes after the bundle's signature are not zero")
        if header.file_bytes != file_bytes:
            raise BundleDamaged(f"the file has {file_bytes} bytes, its header says {header.file_bytes}")
        return header, signer_of(signed, signature)

    def _record_bytes(self, index: int) -> bytes:
        rows = self.header.rows
        if not 0 <= index < len(rows):
            raise InvalidRequest(f"the bundle has blocks 0 to {len(rows) - 1}, not {index}")
        row = rows[index]
        buffer = self._read(row.offset, row.nbytes)
        if hashlib.sha256(buffer).digest() != row.sha256:
            raise BundleDamaged(f"the bytes of record {index} are not those that the bundle's header names")
        end = row.offset + row.nbytes
        if index + 1 < len(rows) and any(self._read(end, rows[index + 1].offset - end)):
            raise BundleDamaged(f"the bytes after record {index} are not zero")
        return buffer

    def _verified(self, index: int, buffer: bytes) -> Record:
        chain = self.header.chain
        try:
            record = decode_record(
                buffer,
                expected_key=chain.keys[index],
                expected_namespace=chain.namespace.digest(),
                max_record_bytes=self._max_record_bytes,
            )
        except BlockCorrupt as error:
            raise BundleDamaged(f"record {index}: {error}") from error
        if record.header.block_index != index or record.header.num_tokens != chain.namespace.block_size:
            raise BundleDamaged(f"record {index} says that it is block {record.header.block_index} of another length")
        return record

    def _read(self, offset: int, nbytes: int) -> bytes:
        """Exactly these bytes; the caller has checked `nbytes`. Raises BundleDamaged where the file ends before."""
        parts: list[bytes] = []
        while nbytes and (part := os.pread(self._file, nbytes, offset)):
            parts.append(part)
            offset += len(part)
            nbytes -= len(part)
        if nbytes:
            raise BundleDamaged(f"the file ends {nbytes} bytes too early")
        return parts[0] if len(parts) == 1 else b"".join(parts)
