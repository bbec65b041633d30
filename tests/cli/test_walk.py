"""What holds for every command: it answers in JSON when asked to, and lists can say more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from transhume.cli.commands import app

_INTERACTIVE = {"vm console"}
"""Joins this terminal to the guest's: there is nothing to put in JSON."""


def commands(group: TyperGroup, before: str = "") -> Iterator[tuple[str, set[str]]]:
    """All commands by what is typed for them, with the names of their options."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", {option for each in command.params for option in each.opts}


def everything() -> dict[str, set[str]]:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    return dict(commands(group))


@pytest.mark.parametrize("name", sorted(everything().keys() - _INTERACTIVE))
def test_every_command_answers_in_json(name: str) -> None:
    assert "--json" in everything()[name]


@pytest.mark.parametrize("name", ["hosts", "vm list", "migrations", "operations"])
def test_lists_have_more_to_say(name: str) -> None:
    assert {"--output", "-o"} <= everything()[name]
