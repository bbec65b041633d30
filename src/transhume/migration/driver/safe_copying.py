"""The source's part of a safe copy: a thread that writes down what is owed, beside the push and after it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestRam
from transhume.memory.runs import Runs
from transhume.migration.transfer.safe_copy import SafeCopyWriter, discard, is_complete
from transhume.model.errors import TranshumeError, VmmError
from transhume.model.migration import PagingReport
from transhume.vmm.niceness import put_this_thread_back

STEP_PAGES = 2048
"""The copy goes in steps of 8 MiB, the last pages first: the push begins at the other end."""


class SafeCopying:
    """Of one migration. `path` None: no copy was asked for, and nothing here does anything.

    A copy that cannot be written stops no migration: the report says why there is none.
    """

    def __init__(self, path: Path | None, migration: str, log: Callable[[str], None]) -> None:
        self._path = path
        self._migration = migration
        self._log = log
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._begun_s = 0.0
        self._pages = 0
        self._done_s: float | None = None
        self._error = ""

    def begin(self, ram: GuestRam, owed: Sequence[Runs]) -> None:
        """Write these pages down, in the background; what a predecessor has written is not written again.

        Does nothing when it has begun already, or was removed. `ram` must stay open until `close`.
        """
        if self._path is None or self._thread is not None or self._stop.is_set():
            return
        self._begun_s = time.monotonic()
        self._thread = threading.Thread(
            target=self._run, args=(self._path, ram, list(owed)), name="safe copy", daemon=True
        )
        self._thread.start()

    def holds_all(self, block_pages: Sequence[int]) -> bool:
        """Whether the file, by whichever mover, holds every page that is owed."""
        if self._path is None:
            return False
        try:
            return is_complete(self._path, self._migration, block_pages)
        except VmmError:
            return False

    def report(self, paging: PagingReport) -> PagingReport:
        """`paging` with what is known of the copy."""
        if self._path is None:
            return paging
        done_ms = None if self._done_s is None else self._done_s * 1000
        return paging.model_copy(
            update={
                "safe_copy_pages": self._pages,
                "safe_copy_ms": done_ms,
                "safe_copy_error": self._error,
            }
        )

    def close(self) -> None:
        """Stop writing; the file stays. Waits for the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def remove(self) -> None:
        """Nobody needs the copy any more."""
        self._stop.set()
        if self._path is not None:
            discard(self._path)

    def _run(self, path: Path, ram: GuestRam, owed: list[Runs]) -> None:
        put_this_thread_back()
        try:
            writer = SafeCopyWriter(path, self._migration, [block.page_count for block in ram.blocks])
            try:
                self._write(writer, ram, owed)
            finally:
                writer.close()
        except (TranshumeError, OSError) as error:
            self._error = str(error)
            self._log(f"the safe copy ended: {error}")

    def _write(self, writer: SafeCopyWriter, ram: GuestRam, owed: list[Runs]) -> None:
        for index in reversed(range(len(owed))):
            copied = writer.copied[index]
            self._pages += page_runs.page_count(copied)
            left = page_runs.subtract(owed[index], copied)
            for piece in reversed(list(page_runs.batches(left, STEP_PAGES, STEP_PAGES))):
                if not writer.write(ram.blocks[index], piece, self._stop):
                    return
                self._pages += page_runs.page_count(piece)
        if not writer.complete:
            writer.end()
        self._done_s = time.monotonic() - self._begun_s
