"""The diagrams in docs/PROTOCOL.md show the tables that the movers run."""

from __future__ import annotations

from pathlib import Path

import pytest

from transhume.migration.diagrams import TABLES, picture, with_pictures
from transhume.model.errors import NotFound

PROTOCOL = Path(__file__).parents[2] / "docs" / "PROTOCOL.md"


def test_the_document_shows_the_tables_of_today() -> None:
    text = PROTOCOL.read_text()
    assert with_pictures(text) == text, (
        "a table of transitions has changed: draw the diagrams anew with "
        "`.venv/bin/python -m transhume.migration.diagrams --write docs/PROTOCOL.md`"
    )


@pytest.mark.parametrize("name", TABLES)
def test_a_picture_has_every_change_of_state_and_no_other(name: str) -> None:
    wanted = {
        (state.value, target.value, event.__name__)
        for state, rules in TABLES[name].items()
        for event, rule in rules.items()
        for target in rule.targets
        if target != state
    }
    drawn: set[tuple[str, str, str]] = set()
    for line in picture(name).split("\n")[1:]:
        arrow, events = line.strip().split(": ")
        begin, end = (part.replace("_", "-") for part in arrow.split(" --> "))
        drawn.update((begin, end, event) for event in events.split(", "))
    assert drawn == wanted


def test_only_the_marked_places_are_replaced() -> None:
    places = [f"<!-- diagram: {name} -->\nold\n<!-- end of diagram -->" for name in TABLES]
    before = "before\n" + "\nbetween\n".join(places) + "\nafter\n"
    after = with_pictures(before)
    assert "old" not in after
    assert after.startswith("before\n<!-- diagram: source -->\n```mermaid\nstateDiagram-v2\n")
    assert after.endswith("<!-- end of diagram -->\nafter\n")
    assert "\nbetween\n" in after


def test_a_document_without_a_place_for_a_diagram_is_told_so() -> None:
    with pytest.raises(NotFound, match="the destination"):
        with_pictures("<!-- diagram: source -->\n<!-- end of diagram -->")
