"""A conversation with a state machine: what it is told, what it answers, from top to bottom.

Functions marked by a `Conversations` take one argument, the conversation, and run as ordinary tests. The mark
also collects them, so that one more test can hold all of them again and see which rules of the table none of
them has ever taken. (Conversations as tests are mitmproxy's idea, its playbooks.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Generic, TypeVar

import pytest

from transhume.migration import events as ev
from transhume.migration.machine import Command, Event, Machine, UnexpectedEvent
from transhume.model.migration import MigrationOptions

MachineT = TypeVar("MachineT", bound=Machine[Any])
Answer = Command | type[Command]
Rule = tuple[StrEnum, type[Event]]


class Conversation(Generic[MachineT]):
    """Talks to one machine on a clock of its own, and remembers which rules were taken."""

    def __init__(self, machine: MachineT, taken: set[Rule]) -> None:
        self.machine = machine
        self.now_s = 0.0
        self.taken = taken

    def tell(self, event: Event, *answers: Answer, then: StrEnum | None = None) -> None:
        """Tell one event and demand exactly these answers; a class stands for any of its commands.

        Without `then` the machine must stay in its state.
        """
        before = self.machine.state
        commands = tuple(self.machine.handle(event, self.now_s))
        self.taken.add((before, type(event)))
        assert len(commands) == len(answers), f"{event} was answered by {commands}"
        for command, answer in zip(commands, answers, strict=True):
            matches = isinstance(command, answer) if isinstance(answer, type) else command == answer
            assert matches, f"{event} was answered by {commands}"
        expected = before if then is None else then
        assert self.machine.state is expected, f"{event} led to {self.machine.state}"

    def wait(self, duration_s: float, *answers: Answer, then: StrEnum | None = None) -> None:
        """Let time pass, then tell it."""
        self.now_s += duration_s
        self.tell(ev.Tick(), *answers, then=then)

    def echoes(self, *events: Event) -> None:
        """Tell late or meaningless events: each is allowed, and none of them changes anything."""
        for event in events:
            before = vars_of(self.machine)
            self.tell(event)
            assert vars_of(self.machine) == before, f"{event} changed the machine"

    def refuses(self, event: Event) -> None:
        """Tell an event that the table does not allow: it raises and changes nothing."""
        before = vars_of(self.machine)
        with pytest.raises(UnexpectedEvent) as unexpected:
            self.machine.handle(event, self.now_s)
        assert unexpected.value.state is self.machine.state
        assert unexpected.value.event == event
        assert vars_of(self.machine) == before


def vars_of(machine: Machine[Any]) -> dict[str, object]:
    """All that a machine remembers, as a copy."""
    return copy.deepcopy(vars(machine))


Talk = Callable[[Conversation[MachineT]], None]


class Conversations(Generic[MachineT]):
    """The conversations held with one kind of machine. An instance is the mark that makes one a test."""

    def __init__(self, new_machine: Callable[[MigrationOptions], MachineT]) -> None:
        self._new_machine = new_machine
        self._held: list[Callable[[set[Rule]], None]] = []

    def __call__(
        self, after: Sequence[Talk[MachineT]] = (), **options: Any
    ) -> Callable[[Talk[MachineT]], Callable[[], None]]:
        """Mark a conversation with a machine whose migration has these options.

        With `after` it is held once after each of these openings, with a new machine each time.
        """

        def mark(talk: Talk[MachineT]) -> Callable[[], None]:
            def hold(taken: set[Rule]) -> None:
                for opening in after or (_nothing,):
                    conversation = Conversation(self._new_machine(MigrationOptions(**options)), taken)
                    opening(conversation)
                    opened_in = conversation.machine.state
                    try:
                        talk(conversation)
                    except AssertionError as error:
                        error.add_note(f"in the conversation that began in {opened_in}")
                        raise

            def test() -> None:
                hold(set())

            self._held.append(hold)
            test.__name__ = talk.__name__
            test.__doc__ = talk.__doc__
            return test

        return mark

    def rules_never_taken(self) -> list[str]:
        """Hold every conversation again; the rules of the table that none of them took."""
        taken: set[Rule] = set()
        for hold in self._held:
            hold(taken)
        return [
            f"{event.__name__} in {state.value}"
            for state, rules in self._new_machine(MigrationOptions()).table.items()
            for event in rules
            if (state, event) not in taken
        ]


def _nothing(_: object) -> None:
    """The opening of a conversation that begins at the beginning."""
