"""Writes what `make faults` saw into docs/FAULTS.md.

    .venv/bin/python docs/faults.py [build/faults.json]

What stands between `<!-- matrix -->` and `<!-- end of matrix -->` is replaced: one row for each fault, one
column for each order of transfer and phase. A cell says where the VM must run and, if that differs, where it
did.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAULTS = Path(__file__).with_name("FAULTS.md")
RECORDS = FAULTS.parents[1] / "build" / "faults.json"

_MARKED = re.compile(r"(<!-- matrix -->\n).*?(<!-- end of matrix -->)", re.DOTALL)


def text_of(cells: Sequence[dict[str, Any]]) -> str:
    """The table, faults and columns in the order in which they were tried."""
    columns = list(dict.fromkeys((cell["mode"], cell["phase"]) for cell in cells))
    faults = list(dict.fromkeys(cell["fault"] for cell in cells))
    found = {(cell["fault"], cell["mode"], cell["phase"]): cell for cell in cells}
    lines = [
        ["fault", *(f"{mode}, in {phase}" for mode, phase in columns)],
        ["---"] * (len(columns) + 1),
        *([fault, *(_shown(found.get((fault, *column))) for column in columns)] for fault in faults),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str]) -> int:
    """Rewrite the document; exit code 1 when nothing was tried."""
    source = Path(arguments[0]) if arguments else RECORDS
    cells = json.loads(source.read_text()) if source.exists() else []
    if not cells:
        sys.stderr.write(f"{source} holds nothing: run `make faults` first\n")
        return 1
    text = text_of(cells)
    FAULTS.write_text(_MARKED.sub(lambda match: f"{match[1]}{text}{match[2]}", FAULTS.read_text()))
    return 0


def _shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not tried"
    must, did = cell["must"], cell["did"]
    if did in must.split(" or "):
        return did
    return f"**{did}**, must be {must}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
