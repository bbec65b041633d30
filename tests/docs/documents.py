"""What the tests of the documents look at: the files, and what stands in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "transhume"

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def documents() -> list[Path]:
    """Every document of this tree, the README first."""
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(path: Path) -> str:
    """A document as a test's id."""
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """The text without its blocks of code."""
    return _FENCED.sub("", path.read_text())


def links(path: Path) -> list[str]:
    """Targets of all links that lead into this tree."""
    targets = [match["target"] for match in _LINK.finditer(prose(path))]
    return [target for target in targets if "://" not in target]


def spans(path: Path) -> list[str]:
    """What is set as code inside the text."""
    return [match[1] for match in _CODE.finditer(prose(path))]


def anchors(path: Path) -> set[str]:
    """The names under which a document's headings are reached, as web hosts of git make them."""
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(prose(path)))
    return {heading.strip().replace(" ", "-") for heading in kept}


def table_rows(path: Path) -> list[list[str]]:
    """The cells of every line of every table, heads and rules included."""
    lines = [line for line in prose(path).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
