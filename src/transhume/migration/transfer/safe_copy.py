"""A second copy of the pages that are owed, in a file that both hosts reach.

While pages are owed only the source has them, and a source that is lost takes the VM with it. So the source
also writes them down, and a destination that has lost its source reads on there. The pages do not change any
more, so it does not matter which way one comes, or if it comes both ways.

The file is a head line and then records, appended one after the other::

    {"format": 1, "migration": ..., "block_pages": [...]}\\n
    magic "THPG" | kind u8 | - | block u16 | runs u32 | payload bytes u32 | crc32 u32 | runs u64 pairs | pages

A record that was torn by the death of its writer, or that has not reached the storage, fails its check sum
and ends what can be read; a successor goes on from there. The last record says that nothing is missing.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestBlock
from transhume.memory.runs import Runs
from transhume.memory.zero import read_divided
from transhume.model.errors import VmmError
from transhume.model.migration import Migration
from transhume.model.vm import PAGE_BYTES

RECORD_PAGES = 256
RECORD_RUNS = 512
FORMAT = 1
MAGIC = b"THPG"
SYNC_BYTES = 32 << 20
HEAD_LIMIT_BYTES = 64 << 10

_RECORD = struct.Struct("<4sBxHIII")
_RUN_BYTES = 16
_CHECKSUM_BYTES = 4


class Kind(IntEnum):
    """What a record holds: pages with their content, pages of zeros, or the word that this was all."""

    PAGES = 1
    ZEROS = 2
    END = 3


@dataclass(frozen=True)
class Record:
    """What a record says of itself. `runs` are its pages; their content is the reader's to show."""

    kind: Kind
    block_index: int
    runs: Runs


def safe_copy_path(migration: Migration) -> Path | None:
    """The file of a migration; None when it has no safe copy."""
    directory = migration.options.safe_dir
    return None if directory is None else Path(directory) / f"{migration.vm}-{migration.id}.pages"


def is_complete(path: Path, migration: str, block_pages: Sequence[int]) -> bool:
    """Whether the copy holds all that it is to hold. Raises `VmmError` where it cannot be read."""
    reader = SafeCopyReader(path, migration, block_pages)
    try:
        for _ in reader.records():
            pass
        return reader.complete
    finally:
        reader.close()


def discard(path: Path) -> None:
    """Nobody needs the copy any more. Best effort: a file that is left over holds memory, and harms
    nothing.
    """
    with suppress(OSError):
        path.unlink(missing_ok=True)


class SafeCopyWriter:
    """Appends to the file of one migration. Belongs to one thread.

    Opening one that is there goes on behind its last whole record; `copied` are the pages before it, block by
    block. Raises `VmmError` when the file cannot be written or is another migration's.
    """

    def __init__(self, path: Path, migration: str, block_pages: Sequence[int]) -> None:
        self._path = path
        self.copied: list[Runs] = [page_runs.empty() for _ in block_pages]
        self.complete = False
        self._buffer = memoryview(bytearray(RECORD_PAGES * PAGE_BYTES))
        self._unsynced_bytes = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _cannot("written", path, error) from error
        try:
            self._take_up(migration, block_pages)
        except BaseException:
            os.close(self._fd)
            raise

    def _take_up(self, migration: str, block_pages: Sequence[int]) -> None:
        if os.fstat(self._fd).st_size == 0:
            head = {"format": FORMAT, "migration": migration, "block_pages": list(block_pages)}
            self._append(json.dumps(head).encode() + b"\n")
            return
        reader = SafeCopyReader(self._path, migration, block_pages)
        try:
            for record in reader.records():
                if record.kind is Kind.END:
                    self.complete = True
                else:
                    held = self.copied[record.block_index]
                    self.copied[record.block_index] = page_runs.union(held, record.runs)
            end = reader.end_offset
        finally:
            reader.close()
        try:
            os.ftruncate(self._fd, end)
            os.lseek(self._fd, end, os.SEEK_SET)
        except OSError as error:
            raise _cannot("written", self._path, error) from error

    def write(self, block: GuestBlock, runs: Runs, stop: threading.Event) -> bool:
        """Append these pages of a RAM block; False when `stop` ended it early. Raises `VmmError`."""
        for batch in page_runs.batches(runs, RECORD_PAGES, RECORD_RUNS):
            if stop.is_set():
                return False
            self._write_batch(block, batch)
        return True

    def end(self) -> None:
        """Say that nothing is missing, once everything before is on the storage. Raises `VmmError`."""
        self._sync()
        self._append(_record(Kind.END, 0, page_runs.empty(), b""))
        self._sync()
        self.complete = True

    def close(self) -> None:
        """Let go of the file; it stays."""
        os.close(self._fd)

    def _write_batch(self, block: GuestBlock, batch: Runs) -> None:
        zeros, data, words = read_divided(block, batch, self._buffer)
        if len(zeros):
            self._append(_record(Kind.ZEROS, block.block.index, zeros, b""))
        if len(data):
            content = words.data.cast("B")
            self._append(_record(Kind.PAGES, block.block.index, data, content), content)
        if self._unsynced_bytes >= SYNC_BYTES:
            self._sync()

    def _append(self, *pieces: bytes | memoryview) -> None:
        try:
            for piece in pieces:
                rest = memoryview(piece)
                while len(rest):
                    rest = rest[os.write(self._fd, rest) :]
                self._unsynced_bytes += len(piece)
        except OSError as error:
            raise _cannot("written", self._path, error) from error

    def _sync(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise _cannot("written", self._path, error) from error
        self._unsynced_bytes = 0


class SafeCopyReader:
    """Reads the file of one migration, also while it grows. Belongs to one thread.

    `content` begins with the pages of the record that came last, in order, until the next one is asked for.
    Raises `VmmError` when there is none, or when it is another migration's.
    """

    def __init__(self, path: Path, migration: str, block_pages: Sequence[int]) -> None:
        self._path = path
        self._block_pages = list(block_pages)
        self.complete = False
        self.content = bytearray(RECORD_PAGES * PAGE_BYTES)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _cannot("read", path, error) from error
        try:
            self.end_offset = self._read_head(migration)
        except BaseException:
            os.close(self._fd)
            raise

    def records(self) -> Iterator[Record]:
        """The whole records from where the last call ended, in the order of the file.

        The content of each is checked; what follows the first torn one does not count.
        """
        while (record := self._next()) is not None:
            self.complete = self.complete or record.kind is Kind.END
            yield record

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    def _read_head(self, migration: str) -> int:
        text = self._read(0, bytearray(HEAD_LIMIT_BYTES)).tobytes()
        line, newline, _ = text.partition(b"\n")
        head: object = None
        with suppress(ValueError):
            head = json.loads(line) if newline else None
        expected = {"format": FORMAT, "migration": migration, "block_pages": self._block_pages}
        if head != expected:
            raise VmmError(f"{self._path} is not the safe copy of migration {migration}")
        return len(line) + 1

    def _next(self) -> Record | None:
        fixed = self._read(self.end_offset, bytearray(_RECORD.size))
        if len(fixed) < _RECORD.size:
            return None
        magic, kind, block_index, run_count, payload_bytes, checksum = _RECORD.unpack(fixed)
        if magic != MAGIC or kind not in set(Kind) or run_count > RECORD_RUNS:
            return None
        if payload_bytes > RECORD_PAGES * PAGE_BYTES or block_index >= len(self._block_pages):
            return None
        table_offset = self.end_offset + _RECORD.size
        offset = table_offset + run_count * _RUN_BYTES
        table = self._read(table_offset, bytearray(run_count * _RUN_BYTES))
        content = self._read(offset, memoryview(self.content)[:payload_bytes])
        if len(table) < run_count * _RUN_BYTES or len(content) < payload_bytes:
            return None
        if _checksum(fixed[:-_CHECKSUM_BYTES], table, content) != checksum:
            return None
        runs = np.frombuffer(table, dtype="<i8").reshape(run_count, 2).astype(np.int64)
        if page_runs.fault(runs, self._block_pages[block_index]):
            return None
        if kind == Kind.PAGES and page_runs.page_count(runs) * PAGE_BYTES != payload_bytes:
            return None
        self.end_offset = offset + payload_bytes
        return Record(Kind(kind), block_index, runs)

    def _read(self, offset: int, into: bytearray | memoryview) -> memoryview:
        """The part of `into` that the file could fill."""
        try:
            return memoryview(into)[: os.preadv(self._fd, [into], offset)]
        except OSError as error:
            raise _cannot("read", self._path, error) from error


def _record(kind: Kind, block_index: int, runs: Runs, content: bytes | memoryview) -> bytes:
    """The bytes of a record up to its content."""
    table = runs.astype("<i8").tobytes()
    fixed = _RECORD.pack(MAGIC, kind, block_index, len(runs), len(content), 0)[:-_CHECKSUM_BYTES]
    return fixed + _checksum(fixed, table, content).to_bytes(_CHECKSUM_BYTES, "little") + table


def _checksum(*pieces: bytes | memoryview) -> int:
    value = 0
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return value


def _cannot(verb: str, path: Path, error: OSError) -> VmmError:
    return VmmError(f"the safe copy {path} cannot be {verb}: {error.strerror}")
