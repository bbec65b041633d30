"""The frame of both ends' state machines: events in, commands out, one table of transitions.

A machine never reads a clock, a file or a socket. Whoever drives it (the mover, or the simulator) hands
it one event at a time together with the time, and carries out the commands that come back. The table
is data: it decides which event is allowed in which state, names the method that handles it, and lists the
states that may follow; the diagrams in docs/PROTOCOL.md are drawn from it. (The idea of one file that owns
every transition is h11's, `h11/_state.py`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Generic, TypeVar

State = TypeVar("State", bound=StrEnum)


@dataclass(frozen=True)
class Event:
    """Something that happened. Subclasses say what."""


@dataclass(frozen=True)
class Command:
    """Something that the driver must do. Subclasses say what."""


@dataclass(frozen=True)
class Rule(Generic[State]):
    """What one event does in one state: the name of the handling method and the states that may follow.

    Without a handler the event is expected but changes nothing: the late echo of work that was given up.
    """

    handler: str
    targets: tuple[State, ...]


class UnexpectedEvent(Exception):
    """An event that the table does not allow in this state. The machine is unchanged."""

    def __init__(self, state: StrEnum, event: Event) -> None:
        super().__init__(f"{type(event).__name__} is not expected in state {state.value}")
        self.state = state
        self.event = event


Table = Mapping[State, Mapping[type[Event], Rule[State]]]


class Machine(Generic[State]):
    """Runs one table. Subclasses define `table`, the initial state and the handlers."""

    table: ClassVar[Mapping[StrEnum, Mapping[type[Event], Rule[StrEnum]]]]
    final: ClassVar[frozenset[StrEnum]]

    def __init__(self, state: State) -> None:
        self.state: State = state

    @property
    def finished(self) -> bool:
        """Whether no event can change anything any more."""
        return self.state in self.final

    def handle(self, event: Event, now_s: float) -> Sequence[Command]:
        """Take one event at the monotonic time `now_s`; the answer is what must be done, in order.

        Raises `UnexpectedEvent`, and changes nothing, when the table has no rule for the event.
        """
        if self.finished:
            return ()
        rule = self.table[self.state].get(type(event))
        if rule is None:
            raise UnexpectedEvent(self.state, event)
        if not rule.handler:
            return ()
        before = self.state
        commands: Sequence[Command] = getattr(self, rule.handler)(event, now_s)
        if self.state != before:
            assert self.state in rule.targets, f"{before} -> {self.state} is not in the table"
        return commands


def ignored(*events: type[Event]) -> dict[type[Event], Rule[StrEnum]]:
    """Rules for events that are expected in a state and change nothing."""
    return {event: Rule("", ()) for event in events}


def diagram(table: Mapping[StrEnum, Mapping[type[Event], Rule[StrEnum]]]) -> str:
    """The table as a Mermaid state diagram, one line a transition that changes the state."""
    lines = ["stateDiagram-v2"]
    for state, rules in table.items():
        for event, rule in rules.items():
            lines.extend(
                f"    {state.value.replace('-', '_')} --> {target.value.replace('-', '_')}: {event.__name__}"
                for target in rule.targets
                if target != state
            )
    return "\n".join(lines)
