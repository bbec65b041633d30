"""The destination's part of a safe copy: what is still missing is placed from the file."""

from __future__ import annotations

from pathlib import Path

from transhume.migration.transfer.pager import Pager
from transhume.migration.transfer.safe_copy import Kind, SafeCopyReader


def restore(pager: Pager, path: Path, migration: str) -> None:
    """Place what the copy holds now of the pages that the pager lacks, in the order of the file.

    Raises `VmmError` when there is no copy or it cannot be read; what was placed until then stays.
    """
    reader = SafeCopyReader(path, migration, pager.missing.block_pages)
    try:
        for record in reader.records():
            if pager.missing.left_pages == 0:
                return
            content = reader.content if record.kind is Kind.PAGES else None
            pager.restore(record.block_index, record.runs, content)
    finally:
        reader.close()
