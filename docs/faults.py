"""Writes what `make faults` saw into docs/FAULTS.md.

    .venv/bin/python docs/faults.py [build/faults.json]

What stands between `<!-- matrix -->` and `<!-- end of matrix -->` is replaced: one row for each fault, one
column for each order of transfer and moment. A cell says where the VM ran afterwards and, if that differs,
where it must run; where the fault has nothing to strike there is a dash.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.e2e.fault_strikes import FAULTS as KNOWN_FAULTS
from tests.e2e.test_fault_matrix import CELLS, COLUMNS

FAULTS = Path(__file__).with_name("FAULTS.md")
RECORDS = FAULTS.parents[1] / "build" / "faults.json"

_MARKED = re.compile(r"(<!-- matrix -->\n).*?(<!-- end of matrix -->)", re.DOTALL)


def text_of(cells: Sequence[dict[str, Any]]) -> str:
    """The table, in the order of the test, with what was seen of it."""
    found = {(cell["mode"], cell["moment"], cell["fault"]): cell for cell in cells}
    known = {(mode.value, moment.value, fault) for mode, moment, fault in CELLS}
    columns = [(mode.value, moment.value) for mode, moment in COLUMNS]

    def shown(cell: tuple[str, str, str]) -> str:
        return _shown(found.get(cell)) if cell in known else "-"

    lines = [
        ["fault", *(f"{mode}, {moment}" for mode, moment in columns)],
        ["---"] * (len(columns) + 1),
        *([fault, *(shown((*column, fault)) for column in columns)] for fault in KNOWN_FAULTS),
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
