"""Draws both machines' diagrams into docs/PROTOCOL.md, out of the tables that the movers run.

    python -m transhume.migration.diagrams                        prints them
    python -m transhume.migration.diagrams --write FILE           puts them into FILE, between its markers

A document marks the place of a diagram by `<!-- diagram: source -->` and `<!-- end of diagram -->`. What
stands between the two is replaced, so that a picture can be out of date but never wrong by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from transhume.migration.destination import DestinationMachine
from transhume.migration.machine import Event, Rule, diagram
from transhume.migration.source import SourceMachine
from transhume.model.errors import NotFound

TABLES: Mapping[str, Mapping[StrEnum, Mapping[type[Event], Rule[StrEnum]]]] = {
    "source": SourceMachine.table,
    "destination": DestinationMachine.table,
}
"""The machines that have a diagram, by the name in the markers."""

_MARKED = re.compile(r"(<!-- diagram: (?P<name>[a-z]+) -->\n).*?(<!-- end of diagram -->)", re.DOTALL)


def picture(name: str) -> str:
    """The diagram of one machine, with the events that lead from one state to another on one arrow."""
    head, *lines = diagram(TABLES[name]).split("\n")
    arrows: dict[str, list[str]] = {}
    for line in lines:
        arrow, _, event = line.partition(": ")
        arrows.setdefault(arrow, []).append(event)
    return "\n".join([head, *(f"{arrow}: {', '.join(events)}" for arrow, events in arrows.items())])


def with_pictures(text: str) -> str:
    """The document with every marked diagram drawn anew.

    Raises `NotFound` when one of the machines has no marked place in it.
    """
    missing = set(TABLES) - {match["name"] for match in _MARKED.finditer(text)}
    if missing:
        raise NotFound(
            f"no place for the diagram of the {sorted(missing)[0]}: mark one with "
            f"<!-- diagram: {sorted(missing)[0]} --> and <!-- end of diagram -->"
        )
    return _MARKED.sub(_drawn, text)


def main() -> int:
    """Print the diagrams, or write them into the document that is named."""
    parser = argparse.ArgumentParser(prog="transhume.migration.diagrams", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="the document to bring up to date")
    document: Path | None = parser.parse_args().write
    if document is None:
        sys.stdout.write("\n\n".join(picture(name) for name in TABLES) + "\n")
        return 0
    try:
        document.write_text(with_pictures(document.read_text()))
    except NotFound as error:
        sys.stderr.write(f"{document}: {error.message}\n")
        return error.exit_code
    return 0


def _drawn(match: re.Match[str]) -> str:
    return f"{match[1]}```mermaid\n{picture(match['name'])}\n```\n{match[3]}"


if __name__ == "__main__":
    sys.exit(main())
