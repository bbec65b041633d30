"""The destination's part of a safe copy: what is still missing is placed from the file."""

from __future__ import annotations

from pathlib import Path

from transhume.migration.transfer.pager import Pager
from transhume.migration.transfer.safe_copy import RECORD_PAGES, Kind, SafeCopyReader
from transhume.model.vm import PAGE_BYTES


def restore(pager: Pager, path: Path, migration: str) -> None:
    """Place what the copy holds now of the pages that the pager lacks, in the order of the file.

    Raises `VmmError` when there is no copy or it cannot be read; what was placed until then stays.
    """
    reader = SafeCopyReader(path, migration, pager.missing.block_pages)
    buffer = bytearray(RECORD_PAGES * PAGE_BYTES)
    try:
        for record in reader.records():
            if pager.missing.left_pages == 0:
                return
            if record.kind is Kind.PAGES:
                reader.content(record, buffer)
            content = buffer if record.kind is Kind.PAGES else None
            pager.restore(record.block_index, record.runs, content)
    finally:
        reader.close()
