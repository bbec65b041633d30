"""How lists are printed: `-o wide` has more columns, `-o json` is `--json`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Output(StrEnum):
    """What `-o` takes."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"


OutputOption = Annotated[
    Output, typer.Option("--output", "-o", help="wide: with more columns; json: as --json.")
]
