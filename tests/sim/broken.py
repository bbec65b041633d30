"""Machines and movers with one rule broken each. The simulator is good for something if it catches them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, ClassVar

from transhume.migration import events as ev
from transhume.migration.destination import DestinationMachine
from transhume.migration.destination_table import DestinationState
from transhume.migration.machine import Command, Event, Rule
from transhume.migration.source import SourceMachine
from transhume.migration.source_table import SourceState
from transhume.model.migration import Outcome
from transhume.sim.farm import Parts
from transhume.sim.source_mover import SimSourceMover

S = SourceState
D = DestinationState
AnyTable = Mapping[Any, Mapping[type[Event], Rule[StrEnum]]]


def changed(table: AnyTable, *changes: tuple[StrEnum, type[Event], str]) -> Any:
    """A copy of a table in which every rule may lead anywhere, so that only the invariants judge."""
    anywhere = tuple(table)
    free = {
        state: {event: Rule(rule.handler, anywhere) for event, rule in rules.items()}
        for state, rules in table.items()
    }
    for state, event, handler in changes:
        free[state][event] = Rule(handler, anywhere)
    return free


def without(table: AnyTable, state: StrEnum, event: type[Event]) -> Any:
    """A copy of a table that lacks one rule."""
    free = changed(table)
    del free[state][event]
    return free


class FreeSource(SourceMachine):
    table: ClassVar = changed(SourceMachine.table)


class FreeDestination(DestinationMachine):
    table: ClassVar = changed(DestinationMachine.table)


# --- the register is not asked, or not believed ------------------------------------------------------


class ResumesBeforeItsSwap(FreeDestination):
    def _commit_when_complete(self, now_s: float) -> Sequence[Command]:
        commands = super()._commit_when_complete(now_s)
        return (*commands, ev.ResumeVm()) if commands else ()


class ResumesWithoutAsking(FreeSource):
    def _ask_register(self, now_s: float) -> Sequence[Command]:
        return self._go_on()


class TakesNoAnswerForAnAbort(FreeSource):
    table: ClassVar = changed(
        SourceMachine.table,
        (S.RESOLVING, ev.SwapUnknown, "_abort_unknown"),
        (S.RESOLVING, ev.SwapRefused, "_abort_unknown"),
    )

    def _abort_unknown(self, event: Event, now_s: float) -> Sequence[Command]:
        return self._abort_won(ev.SwapWon(), now_s)


class TakesALostAbortForAWonOne(FreeSource):
    def _abort_lost(self, event: ev.SwapLost, now_s: float) -> Sequence[Command]:
        return self._abort_won(ev.SwapWon(), now_s)


class DoesNotKnowItsOwnEarlierCommit(FreeDestination):
    def _commit_lost(self, event: ev.SwapLost, now_s: float) -> Sequence[Command]:
        self._swap_under_way = False
        return self._give_up("aborted", "somebody was first")


class BelievesARefusalAfterAnUnansweredCommit(FreeDestination):
    def _commit_refused(self, event: ev.SwapRefused, now_s: float) -> Sequence[Command]:
        self._swap_under_way = False
        return self._give_up("store-full", event.message)


class SkipsTheRevoke(FreeDestination):
    def _recovered(self, event: ev.Recovered, now_s: float) -> Sequence[Command]:
        return self._give_up("mover-died", "the destination's mover died")


class GivesUpAmidItsCommit(FreeDestination):
    table: ClassVar = changed(DestinationMachine.table, (D.COMMITTING, ev.LinkLost, "_give_up_link"))


class DoesNotUnderstandTheFarewell(FreeDestination):
    table: ClassVar = without(DestinationMachine.table, D.COMMITTING, ev.PeerFinished)


# --- a successor decides before it knows what it is --------------------------------------------------


class CancelsBeforeItKnowsThatItIsASuccessor(FreeSource):
    table: ClassVar = changed(SourceMachine.table, (S.STARTING, ev.CancelRequested, "_give_up_cancel"))


class ResumesWhenItCannotBegin(FreeSource):
    table: ClassVar = changed(SourceMachine.table, (S.STARTING, ev.CommandFailed, "_give_up_command"))


class TakesARetiredVmForALostOne(FreeSource):
    table: ClassVar = changed(SourceMachine.table, (S.STARTING, ev.QemuDied, "_vm_lost"))


class DestroysBeforeItKnowsThatItIsASuccessor(FreeDestination):
    table: ClassVar = changed(DestinationMachine.table, (D.CREATING, ev.CancelRequested, "_give_up_cancel"))


class DestroysWhenItCannotBegin(FreeDestination):
    table: ClassVar = changed(DestinationMachine.table, (D.CREATING, ev.CommandFailed, "_give_up_command"))


class SuccessorWritesOverTheJournal(SimSourceMover):
    def journal_the_start(self, predecessor_state: str | None) -> None:
        self.host.journal.append(self.machine.state.value)


class NeverThinksThatTheStateWasSent(SimSourceMover):
    def begin(self, predecessor_state: str | None) -> None:
        super().begin("precopy" if predecessor_state else None)


# --- the order of the switchover ---------------------------------------------------------------------


class CommitsWithoutLoading(FreeDestination):
    def _commit_when_complete(self, now_s: float) -> Sequence[Command]:
        self._loaded = True
        return super()._commit_when_complete(now_s)


class DoesNotPause(FreeSource):
    def _pass_ended(self, event: ev.PassEnded, now_s: float) -> Sequence[Command]:
        commands = super()._pass_ended(event, now_s)
        return self._paused(ev.VmPaused(), now_s) if ev.PauseVm() in commands else commands


class SendsTheStateBeforeTheLastPages(FreeSource):
    def _paused(self, event: ev.VmPaused, now_s: float) -> Sequence[Command]:
        super()._paused(event, now_s)
        return self._last_pages_sent(ev.LastPagesSent(ev.PassResult(0, 0, 0, 0, 0.0, 0)), now_s)


class RetiresWhenTheStateIsSent(FreeSource):
    def _state_sent(self, event: ev.StateSent, now_s: float) -> Sequence[Command]:
        return self._retire(event, now_s)


# --- things that never end, or leave something -------------------------------------------------------


class NeverAsksAgain(FreeSource):
    def _tick_resolving(self, event: ev.Tick, now_s: float) -> Sequence[Command]:
        return ()


class NeverCommitsAgain(FreeDestination):
    def _tick_committing(self, event: ev.Tick, now_s: float) -> Sequence[Command]:
        return ()


class WaitsForTheSourceForEver(FreeDestination):
    def _tick_waiting(self, event: ev.Tick, now_s: float) -> Sequence[Command]:
        return ()


class WaitsForASilentSourceForEver(FreeDestination):
    def _tick_silence(self, event: ev.Tick, now_s: float) -> Sequence[Command]:
        return ()


class WaitsForTheCommitForEver(FreeSource):
    def _tick_awaiting(self, event: ev.Tick, now_s: float) -> Sequence[Command]:
        return self._tick_undecided(event, now_s)


class WaitsForWordOfTheResumeForEver(FreeSource):
    def _tick_committed(self, event: ev.Tick, now_s: float) -> Sequence[Command]:
        return ()


class LeavesItsVmBehind(FreeDestination):
    def _give_up(self, code: str, message: str) -> Sequence[Command]:
        super()._give_up(code, message)
        return self._destroyed(ev.VmDestroyed(), 0.0)


# --- reports that are not true -----------------------------------------------------------------------


class DoesNotMissItsQemu(FreeDestination):
    table: ClassVar = changed(DestinationMachine.table, (D.RUNNING, ev.QemuDied, "_finished_alone"))


class TakesALinkThatBreaksForALostVm(FreeSource):
    def _give_up_link(self, event: ev.LinkLost, now_s: float) -> Sequence[Command]:
        self._fail(Outcome.FAILED, event.code, event.message)
        self._lost_everywhere = True
        return self._go_on()


BROKEN: dict[str, Parts] = {
    part.__name__: Parts(source=part)
    for part in (
        ResumesWithoutAsking,
        TakesNoAnswerForAnAbort,
        TakesALostAbortForAWonOne,
        CancelsBeforeItKnowsThatItIsASuccessor,
        ResumesWhenItCannotBegin,
        TakesARetiredVmForALostOne,
        DoesNotPause,
        SendsTheStateBeforeTheLastPages,
        RetiresWhenTheStateIsSent,
        NeverAsksAgain,
        WaitsForTheCommitForEver,
        WaitsForWordOfTheResumeForEver,
        TakesALinkThatBreaksForALostVm,
    )
}
BROKEN |= {
    part.__name__: Parts(destination=part)
    for part in (
        ResumesBeforeItsSwap,
        DoesNotKnowItsOwnEarlierCommit,
        BelievesARefusalAfterAnUnansweredCommit,
        SkipsTheRevoke,
        GivesUpAmidItsCommit,
        DoesNotUnderstandTheFarewell,
        DestroysBeforeItKnowsThatItIsASuccessor,
        DestroysWhenItCannotBegin,
        CommitsWithoutLoading,
        NeverCommitsAgain,
        WaitsForTheSourceForEver,
        WaitsForASilentSourceForEver,
        LeavesItsVmBehind,
        DoesNotMissItsQemu,
    )
}
BROKEN |= {
    part.__name__: Parts(source_mover=part)
    for part in (
        SuccessorWritesOverTheJournal,
        NeverThinksThatTheStateWasSent,
    )
}
