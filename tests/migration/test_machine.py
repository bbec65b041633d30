"""The frame of the machines: what the table promises, whatever is told in whatever order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.migration.conversation import vars_of

from transhume.migration import events as ev
from transhume.migration.destination import DestinationMachine
from transhume.migration.destination_table import DestinationState
from transhume.migration.machine import (
    Command,
    Event,
    Machine,
    Rule,
    UnexpectedEvent,
    diagram,
    ignored,
)
from transhume.migration.source import SourceMachine
from transhume.model.migration import Migration

MIGRATION = Migration(id="m1", vm="web", source="north", destination="south", epoch=7)
PASS = ev.PassResult(
    index=0, pages=100, zero_pages=5, wire_bytes=409_600, duration_s=0.1, dirty_pages_after=90
)

EVENTS: tuple[Event, ...] = (
    ev.Tick(),
    ev.PeerHeard(),
    ev.LinkLost("host-lost", "the connection broke"),
    ev.SwapWon(),
    ev.SwapLost("north", 8),
    ev.SwapLost("south", 8),
    ev.SwapUnknown("no answer"),
    ev.SwapRefused("no space"),
    ev.VmResumed(),
    ev.CommandFailed("ResumeVm", "vmm", "refused"),
    ev.CommandFailed("SendPass", "host-lost", "the connection broke"),
    ev.CommandFailed("DestroyVm", "vmm", "refused"),
    ev.CommandFailed("RetireVm", "vmm", "refused"),
    ev.QemuDied("signal 9"),
    ev.Started(),
    ev.Recovered(state_may_be_sent=False),
    ev.Recovered(state_may_be_sent=True),
    ev.Connected(),
    ev.Armed(0.01),
    ev.PassEnded(PASS),
    ev.VmPaused(),
    ev.LastPagesSent(PASS),
    ev.StateSent(1000),
    ev.PeerCommitted(),
    ev.PeerRunning(0.001, 0.002, 0.003),
    ev.PeerFailed("vmm", "refused"),
    ev.CancelRequested(),
    ev.VmRetired(),
    ev.Listening(),
    ev.MigrationKnown(going_on=True),
    ev.MigrationKnown(going_on=False),
    ev.SourceConnected(),
    ev.PassReceived(0),
    ev.LastPagesReceived(),
    ev.StateReceived(),
    ev.StateLoaded(),
    ev.PeerAborted("cancelled"),
    ev.PeerFinished(),
    ev.VmDestroyed(),
)

BOTH_ENDS: tuple[Callable[[], Machine[Any]], ...] = (
    lambda: SourceMachine(MIGRATION, 1 << 30, now_s=0.0),
    lambda: DestinationMachine(MIGRATION, now_s=0.0),
)
both_ends = pytest.mark.parametrize("new_machine", BOTH_ENDS, ids=("source", "destination"))


class Light(StrEnum):
    RED = "red"
    LATE_GREEN = "late-green"
    OFF = "off"


class Press(Event):
    pass


class Echo(Event):
    pass


class Break(Event):
    pass


class Ring(Command):
    pass


class LightMachine(Machine[Light]):
    """The smallest machine that shows what the frame does."""

    table: ClassVar = {
        Light.RED: {Press: Rule("_press", (Light.LATE_GREEN,)), **ignored(Echo)},
        Light.LATE_GREEN: {Press: Rule("_press", ()), Break: Rule("_break", (Light.OFF,))},
        Light.OFF: {},
    }
    final: ClassVar = frozenset({Light.OFF})

    def _press(self, _: Press, now_s: float) -> Sequence[Command]:
        self.state = Light.LATE_GREEN if self.state is Light.RED else Light.RED
        return (Ring(),)

    def _break(self, _: Break, now_s: float) -> Sequence[Command]:
        self.state = Light.OFF
        return ()


def test_a_rule_names_the_handler_whose_commands_are_the_answer() -> None:
    machine = LightMachine(Light.RED)
    assert machine.handle(Press(), 0.0) == (Ring(),)
    assert machine.state is Light.LATE_GREEN


def test_a_rule_without_a_handler_changes_nothing() -> None:
    machine = LightMachine(Light.RED)
    assert machine.handle(Echo(), 0.0) == ()
    assert machine.state is Light.RED


def test_an_event_without_a_rule_is_refused() -> None:
    machine = LightMachine(Light.RED)
    with pytest.raises(UnexpectedEvent, match="Break is not expected in state red"):
        machine.handle(Break(), 0.0)
    assert machine.state is Light.RED


def test_a_state_that_the_rule_does_not_name_is_a_bug() -> None:
    machine = LightMachine(Light.LATE_GREEN)
    with pytest.raises(AssertionError, match="is not in the table"):
        machine.handle(Press(), 0.0)


def test_nothing_is_heard_after_the_end() -> None:
    machine = LightMachine(Light.LATE_GREEN)
    machine.handle(Break(), 0.0)
    assert machine.finished
    assert machine.handle(Press(), 0.0) == ()


def test_the_diagram_draws_each_change_of_state_once() -> None:
    assert diagram(LightMachine.table).splitlines() == [
        "stateDiagram-v2",
        "    red --> late_green: Press",
        "    late_green --> off: Break",
    ]


@both_ends
def test_every_rule_names_a_method_and_states_of_its_machine(new_machine: Callable[[], Machine[Any]]) -> None:
    machine = new_machine()
    for state, rules in machine.table.items():
        for event, rule in rules.items():
            assert not rule.handler or callable(getattr(machine, rule.handler, None)), (state, event)
            assert set(rule.targets) <= set(machine.table), (state, event)
            assert rule.handler or not rule.targets, (state, event)


@both_ends
def test_every_state_can_be_reached_and_left(new_machine: Callable[[], Machine[Any]]) -> None:
    machine = new_machine()
    targets = {
        target for rules in machine.table.values() for rule in rules.values() for target in rule.targets
    }
    assert targets | {machine.state} == set(machine.table)
    for state, rules in machine.table.items():
        leads_on = any(target != state for rule in rules.values() for target in rule.targets)
        assert leads_on or state in machine.final, f"nothing leads out of {state}"


@both_ends
def test_an_unexpected_event_changes_nothing_in_any_state(new_machine: Callable[[], Machine[Any]]) -> None:
    for state in new_machine().table:
        for event in EVENTS:
            machine = new_machine()
            machine.state = state
            if machine.finished or type(event) in machine.table[state]:
                continue
            before = vars_of(machine)
            with pytest.raises(UnexpectedEvent) as unexpected:
                machine.handle(event, 1.0)
            assert (unexpected.value.state, unexpected.value.event) == (state, event)
            assert vars_of(machine) == before


TOLD = st.lists(st.tuples(st.integers(0, 10_000), st.floats(0.0, 8.0)), max_size=40)


def chosen_event(machine: Machine[Any], number: int) -> Event:
    """An event for a number: mostly one that the state expects, so that walks lead far; sometimes any."""
    expected = [event for event in EVENTS if type(event) in machine.table[machine.state]]
    candidates = expected if expected and number % 10 else EVENTS
    return candidates[number // 10 % len(candidates)]


@both_ends
@settings(deadline=None)
@given(TOLD)
def test_no_sequence_of_events_breaks_a_machine(
    new_machine: Callable[[], Machine[Any]], told: list[tuple[int, float]]
) -> None:
    """Whatever a broken peer, driver or store makes of it: a rule is taken or the event is refused."""
    machine = new_machine()
    now_s = 0.0
    for number, pause_s in told:
        now_s += pause_s
        before = vars_of(machine)
        try:
            machine.handle(chosen_event(machine, number), now_s)
        except UnexpectedEvent:
            assert vars_of(machine) == before


@settings(deadline=None)
@given(TOLD)
def test_a_source_that_sent_the_state_resumes_only_with_leave(told: list[tuple[int, float]]) -> None:
    """Leave: a swap that was won, a register that is known to be ours, or a peer that gave up for good."""
    machine = SourceMachine(MIGRATION, 1 << 30, now_s=0.0)
    now_s = 0.0
    sent = False
    for number, pause_s in told:
        now_s += pause_s
        event = chosen_event(machine, number)
        try:
            commands = machine.handle(event, now_s)
        except UnexpectedEvent:
            continue
        if ev.ResumeVm() in commands and sent:
            assert isinstance(event, ev.SwapWon | ev.PeerFailed) or event == ev.SwapLost("north", 8), event
            sent = False
        sent = sent or ev.SendState() in commands or event == ev.Recovered(state_may_be_sent=True)


@settings(deadline=None)
@given(TOLD)
def test_a_destination_resumes_only_what_is_its_own(told: list[tuple[int, float]]) -> None:
    """It won its swap, or the register or the source that has gone says so; and then it destroys nothing."""
    machine = DestinationMachine(MIGRATION, now_s=0.0)
    now_s = 0.0
    owned = False
    for number, pause_s in told:
        now_s += pause_s
        event = chosen_event(machine, number)
        revoking = machine.state is DestinationState.REVOKING
        try:
            commands = machine.handle(event, now_s)
        except UnexpectedEvent:
            continue
        won = isinstance(event, ev.SwapWon) and not revoking
        heard = isinstance(event, ev.PeerFinished) or event == ev.SwapLost("south", 8)
        owned = owned or won or heard
        assert owned or ev.ResumeVm() not in commands, event
        if owned and machine.state in (DestinationState.RESUMING, DestinationState.RUNNING):
            assert ev.DestroyVm() not in commands, event
