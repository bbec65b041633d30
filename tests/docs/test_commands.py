"""Every command that a document tells people to type exists, with every option that it is given."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pytest
from tests.docs.documents import ROOT, documents, name_of, spans, table_rows
from typer.core import TyperGroup
from typer.main import get_command

from transhume.cli.commands import app

_PROGRAM = re.compile(r"^(?:transhume|\.venv/bin/transhume|[ab]) ")
_OWN_WORDS = {"--help"}


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_commands_exist(document: Path) -> None:
    wrong = [line for line in _commands(document) if _fault(line)]
    assert not wrong, [_fault(line) for line in wrong]


def test_the_readme_has_every_option_of_migrate() -> None:
    cells = [row[0] for row in table_rows(ROOT / "README.md") if row[0].startswith("`--")]
    told = {cell.strip("`").split()[0] for cell in cells}
    assert told == _options(_group().commands["migrate"].params) - _OWN_WORDS


def test_make_has_what_the_documents_tell_to_make() -> None:
    made = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [line for path in documents() for line in [*_code_lines(path), *spans(path)]]
    told = {match[1] for text in texts if (match := re.match(r"make ([a-z]+)", text))}
    assert told <= made


class Parameter(Protocol):
    """An option or an argument, with all its names."""

    opts: list[str]


def _group() -> TyperGroup:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    return group


def _commands(document: Path) -> list[str]:
    """Lines that begin with the program's name, or with an alias of it, without what follows a comment."""
    lines = [*_code_lines(document), *(span for span in spans(document) if span.startswith("transhume "))]
    return [_PROGRAM.sub("", line) for line in lines if _PROGRAM.match(line)]


def _code_lines(document: Path) -> list[str]:
    """The lines of indented code, those that are continued joined."""
    text = document.read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def _fault(line: str) -> str:
    """What is wrong with a command; empty when nothing is."""
    words = shlex.split(line, comments=True)
    group = _group()
    if words and all(word.startswith("--") for word in words):
        unknown = set(words) - _options(group.params)
        return f"{line}: {', '.join(sorted(unknown))} is no option" if unknown else ""
    while True:
        while words and words[0].startswith("-"):
            words = words[2 if words[0] == "--state-dir" else 1 :]
        command = group.commands.get(words.pop(0)) if words else None
        if command is None:
            return f"{line}: no such command"
        if not isinstance(command, TyperGroup):
            break
        group = command
    unknown = {word for word in words if word.startswith("--")} - _options(command.params)
    return f"{line}: {', '.join(sorted(unknown))} is no option" if unknown else ""


def _options(parameters: Sequence[Parameter]) -> set[str]:
    names = {name for parameter in parameters for name in parameter.opts}
    return {name for name in names if name.startswith("--")} | _OWN_WORDS
