"""The picture of the rooms in docs/ARCHITECTURE.md holds: no room imports what its arrows do not reach."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.docs.documents import ROOT, SOURCES

_PICTURE = re.compile(r"<!-- rooms -->\n(.*?)<!-- end of rooms -->", re.DOTALL)


def test_every_room_is_in_the_picture() -> None:
    drawn = {room for arrow in _drawn() for room in arrow}
    rooms = {path.parent.relative_to(SOURCES).parts[0] for path in SOURCES.glob("*/*.py")}
    assert rooms == drawn


def test_no_room_imports_one_that_its_arrows_do_not_reach() -> None:
    arrows = _drawn()
    wrong = {(room, other) for room, other in _imports() if other not in _reached(room, arrows)}
    assert not wrong


def test_the_arrows_lead_round_nowhere() -> None:
    arrows = _drawn()
    assert not {room for room, _ in arrows if room in _reached(room, arrows)}


def _drawn() -> set[tuple[str, str]]:
    match = _PICTURE.search((ROOT / "docs" / "ARCHITECTURE.md").read_text())
    assert match is not None
    return set(re.findall(r"^    (\w+) --> (\w+)$", match[1], re.MULTILINE))


def _reached(room: str, arrows: set[tuple[str, str]]) -> set[str]:
    reached: set[str] = set()
    ahead = {room}
    while ahead:
        ahead = {end for begin, end in arrows if begin in ahead} - reached
        reached |= ahead
    return reached


def _imports() -> set[tuple[str, str]]:
    """Pairs of rooms: the first imports the second."""
    pairs: set[tuple[str, str]] = set()
    for path in sorted(SOURCES.glob("*/**/*.py")):
        room = path.relative_to(SOURCES).parts[0]
        pairs.update((room, other) for other in _rooms_imported(path) if other != room)
    return pairs


def _rooms_imported(path: Path) -> set[str]:
    """Start-up code (files beside the rooms) does not count: it may name everything."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
    inside = {module.split(".")[1] for module in modules if module.startswith("transhume.")}
    return {name for name in inside if (SOURCES / name).is_dir()}
