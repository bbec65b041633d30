"""Each command and each option stands in a man page, and troff has nothing to complain about."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from transhume.cli.commands import app
from transhume.cli.man_pages import pages

PAGES = pages()


def test_every_command_has_a_page_and_no_page_is_left_over() -> None:
    wanted = {f"transhume-{words[0]}.1" for words, _ in _commands()}
    assert set(PAGES) == wanted | {"transhume.1"}


@pytest.mark.parametrize("name", sorted(PAGES))
def test_troff_renders_it_without_a_warning(name: str) -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-K", "utf8", "-z"],
        input=PAGES[name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_option_and_every_command_below_is_named() -> None:
    missing = []
    for words, command in _commands():
        page = PAGES[f"transhume-{words[0]}.1"].replace("\\-", "-")
        if " ".join(("transhume", *words)) not in page:
            missing.append(words)
        options = [name for each in command.params if not each.hidden for name in each.opts]
        missing += [(*words, name) for name in options if name.startswith("--") and name not in page]
    assert not missing


def _commands(group: Any = None, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Everything that can be typed: the words, and what they name."""
    here: Any = group or get_command(app)
    for name, each in here.commands.items():
        if each.hidden:
            continue
        if isinstance(each, TyperGroup):
            yield from _commands(each, (*before, name))
        else:
            yield (*before, name), each
