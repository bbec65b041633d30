"""Whatever a document points at is there: files, headings, classes, functions, tests, limits."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest
from tests.docs.documents import ROOT, SOURCES, anchors, documents, links, name_of, spans, table_rows

_LIMIT = re.compile(r"`([a-z_.]+\.[A-Za-z_.]+)`")


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    lost = []
    for link in links(document):
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_code_that_is_named_exists(document: Path) -> None:
    """`room/file.py`, `room/file.py:Class.method` and `tests/room/test_x.py::test_y`."""
    lost = [span for span in spans(document) if re.match(r"[\w/.]+\.py\b", span) and not _exists(span)]
    assert not lost


def test_limits_are_those_of_the_code() -> None:
    rows = table_rows(ROOT / "docs" / "PROTOCOL.md")
    told = {match[1]: row[1] for row in rows if (match := _LIMIT.fullmatch(row[0]))}
    assert len(told) > 30
    wrong = {name: value for name, value in told.items() if float(value) != _value(name)}
    assert not wrong


def _exists(span: str) -> bool:
    path, _, name = span.partition("::" if "::" in span else ":")
    files = [file for file in (SOURCES / path, ROOT / path) if file.is_file()]
    return bool(files) and (not name or name in _names(files[0]))


@cache
def _names(path: Path) -> frozenset[str]:
    """Classes, functions and names with a value in a module, and `Class.name` for those inside a class."""
    module = ast.parse(path.read_text())
    names = set(_defined(module.body))
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{name}" for name in _defined(node.body))
    return frozenset(names)


def _defined(body: list[ast.stmt]) -> list[str]:
    names = []
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names


def _value(name: str) -> float:
    """The value of `room.module.NAME` or of `room.module.Class.field`'s default."""
    parts = name.split(".")
    if parts[-2][0].isupper():
        holder = getattr(importlib.import_module(f"transhume.{'.'.join(parts[:-2])}"), parts[-2])
        fields = getattr(holder, "model_fields", None) or holder.__dataclass_fields__
        return float(fields[parts[-1]].default)
    return float(getattr(importlib.import_module(f"transhume.{'.'.join(parts[:-1])}"), parts[-1]))
