"""Man pages, made from the commands themselves: `python -m transhume.cli.man_pages DIR` writes them."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.core import TyperGroup
from typer.main import get_command

from transhume import __version__
from transhume.cli.commands import app

PROGRAM = "transhume"
_CODE = re.compile(r"`([^`]+)`")


Command = Any
Parameter = Any
"""What typer makes of a function and of its arguments; it has no public names for these classes."""


def pages() -> dict[str, str]:
    """File name and text of each page: the program's own, and one for each command directly below it."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    shown = {name: command for name, command in group.commands.items() if not command.hidden}
    found = {f"{PROGRAM}.1": _program_page(group, shown)}
    for name, command in shown.items():
        found[f"{PROGRAM}-{name}.1"] = _command_page(name, command)
    return found


def _program_page(group: Command, shown: dict[str, Command]) -> str:
    lines = [
        *_head(PROGRAM, _first_sentence(group)),
        ".SH SYNOPSIS",
        f".B {PROGRAM}",
        "[options]",
        ".I command",
        "\\&...",
        *_options(group),
        ".SH COMMANDS",
    ]
    for name, command in shown.items():
        lines += [".TP", f".BR {_safe(f'{PROGRAM}-{name}')} (1)", _text(_first_sentence(command))]
    return "\n".join(lines) + "\n"


def _command_page(name: str, command: Command) -> str:
    lines = [*_head(f"{PROGRAM}-{name}", _first_sentence(command)), ".SH SYNOPSIS"]
    usages = list(_usages((PROGRAM, name), command))
    for index, (words, each) in enumerate(usages):
        lines += [*([".br"] if index else []), f".B {_safe(' '.join(words))}", _arguments(each)]
    lines += [".SH DESCRIPTION", *_paragraphs(command), *_options(command)]
    for words, each in usages:
        if each is not command:
            heading = _safe(" ".join(words[2:]).upper())
            lines += [f'.SH "{heading}"', *_paragraphs(each), *_options(each, ".SS")]
    lines += [".SH SEE ALSO", f".BR {PROGRAM} (1)"]
    return "\n".join(lines) + "\n"


def _head(name: str, what_for: str) -> list[str]:
    return [
        f'.TH {_safe(name.upper())} 1 "" "{PROGRAM} {__version__}" "{PROGRAM.title()}"',
        ".SH NAME",
        f"{_safe(name)} \\- {_text(what_for[:1].lower() + what_for[1:].rstrip('.'))}",
    ]


def _usages(words: tuple[str, ...], command: Command) -> Iterator[tuple[tuple[str, ...], Command]]:
    """Everything below a command that can be typed."""
    if not isinstance(command, TyperGroup):
        yield words, command
        return
    if command.invoke_without_command:
        yield words, command
    for name, each in command.commands.items():
        if not each.hidden:
            yield from _usages((*words, name), each)


def _arguments(command: Command) -> str:
    parts = ["[options]"]
    for each in command.params:
        if each.param_type_name == "argument":
            word = f"\\fI{_safe(_placeholder(each))}\\fR" + (" ..." if each.nargs == -1 else "")
            parts.append(word if each.required else f"[{word}]")
    return " ".join(parts)


def _options(command: Command, heading: str = ".SH") -> list[str]:
    lines = [f"{heading} OPTIONS" if heading == ".SH" else f"{heading} Options of it"]
    for each in command.params:
        if each.hidden:
            continue
        if each.param_type_name == "argument":
            title = f"\\fI{_safe(_placeholder(each))}\\fR"
        else:
            title = ", ".join(f"\\fB{_safe(name)}\\fR" for name in (*each.opts, *each.secondary_opts))
            if not each.is_flag:
                title += f" \\fI{_safe(_placeholder(each))}\\fR"
        lines += [".TP", title, _text(each.help or "See above.")]
    return [*lines, ".TP", "\\fB\\-\\-help\\fR", "Show a short help and end."]


def _placeholder(parameter: Parameter) -> str:
    return parameter.metavar or (parameter.name or "value").upper()


def _first_sentence(command: Command) -> str:
    text = " ".join(inspect.cleandoc(command.help or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:;]) ", text)[0].rstrip(":;")


def _paragraphs(command: Command) -> list[str]:
    lines = []
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        lines += [".PP", _text(" ".join(paragraph.split()))]
    return lines


def _text(text: str) -> str:
    """Running text; what stands between backticks becomes bold."""
    return _CODE.sub(r"\\fB\1\\fR", _safe(text))


def _safe(text: str) -> str:
    """Nothing in it is a request of troff."""
    safe = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{safe}" if safe.startswith((".", "'")) else safe


def main() -> None:
    """Write all pages into a folder; it is made if it is not there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
