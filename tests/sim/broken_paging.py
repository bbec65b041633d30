"""More machines, movers and controllers with one rule broken each: what comes after the resume."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar

from tests.sim.broken import D, FreeDestination, FreeSource, S, changed

from transhume.migration import events as ev
from transhume.migration.machine import Command, Event
from transhume.migration.source import SourceMachine
from transhume.model.errors import PagesLost
from transhume.model.migration import Migration
from transhume.sim.controller import SimController, Update
from transhume.sim.destination_mover import SimDestinationMover
from transhume.sim.farm import Parts
from transhume.sim.plan import Side
from transhume.sim.source_mover import SimSourceMover

# --- pages that are owed after the resume ------------------------------------------------------------


class RetiresWhenTheLinkBreaks(FreeSource):
    table: ClassVar = changed(SourceMachine.table, (S.PAGING, ev.LinkLost, "_retire_now"))

    def _retire_now(self, event: ev.LinkLost, now_s: float) -> Sequence[Command]:
        return self._all_paged(now_s)


class RetiresWhenTheDestinationRuns(FreeSource):
    def _running(self, event: ev.PeerRunning, now_s: float) -> Sequence[Command]:
        self._owing = False
        return super()._running(event, now_s)


class RetiresWhenCancelledAmidPaging(FreeSource):
    table: ClassVar = changed(SourceMachine.table, (S.PAGING, ev.CancelRequested, "_free"))

    def _free(self, event: ev.CancelRequested, now_s: float) -> Sequence[Command]:
        return self._all_paged(now_s)


class RetiresWhenItHasLostTheRegister(FreeSource):
    def _abort_lost(self, event: ev.SwapLost, now_s: float) -> Sequence[Command]:
        self._owing = False
        return super()._abort_lost(event, now_s)


class TakesAFailedSearchForAnEnd(FreeSource):
    def _reconnect_failed(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        return self._all_paged(now_s)


class DoesNotBelieveThatSomethingIsMissing(FreeSource):
    def _reconnected(self, event: ev.Reconnected, now_s: float) -> Sequence[Command]:
        return self._all_paged(now_s)


class NeverLooksAgain(FreeSource):
    def _tick_reconnecting(self, event: ev.Tick, now_s: float) -> Sequence[Command]:
        return ()


class NeverAsksWhetherAllIsOver(FreeSource):
    def _migration_known(self, event: ev.MigrationKnown, now_s: float) -> Sequence[Command]:
        return ()


class PushesNothing(FreeSource):
    def _reconnected(self, event: ev.Reconnected, now_s: float) -> Sequence[Command]:
        return [each for each in super()._reconnected(event, now_s) if not isinstance(each, ev.StartPush)]

    def _state_sent(self, event: ev.StateSent, now_s: float) -> Sequence[Command]:
        super()._state_sent(event, now_s)
        return ()


class SuccessorForgetsThatItOwes(FreeSource):
    def __init__(self, migration: Migration, ram_bytes: int, now_s: float, owing: bool = False) -> None:
        super().__init__(migration, ram_bytes, now_s)


class TakesAnEndedRecordForAnEnd(FreeSource):
    def _migration_known(self, event: ev.MigrationKnown, now_s: float) -> Sequence[Command]:
        return super()._migration_known(event, now_s) if event.going_on else self._all_paged(now_s)


class WaitsForLostPages(FreeSource):
    def _lose_pages(self) -> Sequence[Command]:
        return self._look_again(ev.LinkLost("", ""), self._heard_s)


class RunsWithPagesMissing(FreeDestination):
    def _resumed(self, event: ev.VmResumed, now_s: float) -> Sequence[Command]:
        self._owed_pages = 0
        return super()._resumed(event, now_s)


class SaysPagedTooEarly(FreeDestination):
    def _resumed(self, event: ev.VmResumed, now_s: float) -> Sequence[Command]:
        self._all_here = True
        return super()._resumed(event, now_s)


class SuccessorForgetsThatItLacksPages(FreeDestination):
    def __init__(self, migration: Migration, now_s: float, owed_pages: int = 0) -> None:
        super().__init__(migration, now_s)


class WaitsForPagesThatAreLost(FreeDestination):
    def _known_while_paging(self, event: ev.MigrationKnown, now_s: float) -> Sequence[Command]:
        return ()


class DoesNotCountAsAloneBeforePaging(FreeDestination):
    def _note_source_lost(self, event: ev.LinkLost, now_s: float) -> Sequence[Command]:
        return super()._note_source_lost(event, now_s) if self.state is D.PAGING else ()


class FinishesWhenTheSourceIsLost(FreeDestination):
    def _source_lost(self, event: ev.LinkLost, now_s: float) -> Sequence[Command]:
        return self._finished_alone(event, now_s)


class NeverGivesUp(FreeDestination):
    def _tick_paging(self, event: ev.Tick, now_s: float) -> Sequence[Command]:
        return ()


class DoesNotNoticeThatAllIsHere(FreeDestination):
    def _note_all_paged(self, event: ev.AllPaged, now_s: float) -> Sequence[Command]:
        return ()


class PlacesWhatComesTwice(SimDestinationMover):
    def unplaced(self, pages: Iterable[int]) -> tuple[int, ...]:
        return tuple(pages)


class SuccessorForgetsWhatWasPlaced(SimDestinationMover):
    def still_missing(self, owed: frozenset[int]) -> set[int]:
        return set(owed)


class LetsTheVmReadZeros(SimDestinationMover):
    def _start_paging(self) -> None:
        super()._start_paging()
        self.vm.guard(False)


class LosesPagesWithoutAsking(FreeSource):
    def _reconnect_failed(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        return self._lose_pages() if event.code == PagesLost.code else super()._reconnect_failed(event, now_s)


class WaitsForPagesOfAMemoryThatIsGone(FreeSource):
    def _reconnect_failed(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        return super()._reconnect_failed(ev.CommandFailed(event.command, "host-lost", ""), now_s)


# --- pages that are compared, and copied -------------------------------------------------------------


class IsFreedBeforeTheComparison(FreeSource):
    def _reconnected(self, event: ev.Reconnected, now_s: float) -> Sequence[Command]:
        return super()._reconnected(ev.Reconnected(event.missing_pages), now_s)


class SaysNothingOfADifference(FreeSource):
    def _note_difference(self, event: ev.MemoryDiffers, now_s: float) -> Sequence[Command]:
        return ()


class TakesADifferenceForAnEqual(FreeDestination):
    def _memory_differs(self, event: ev.MemoryDiffers, now_s: float) -> Sequence[Command]:
        return self._all_paged(ev.AllPaged(), now_s)


class ComparesOnceOnly(FreeDestination):
    def _source_back(self, event: ev.SourceConnected, now_s: float) -> Sequence[Command]:
        return [each for each in super()._source_back(event, now_s) if not isinstance(each, ev.VerifyPages)]


class NeverLooksIntoTheSafeCopy(FreeDestination):
    def _read_copy(self) -> Sequence[Command]:
        return ()


class LooksIntoTheSafeCopyOnce(FreeDestination):
    def _safe_copy_read(self, event: ev.SafeCopyRead, now_s: float) -> Sequence[Command]:
        return ()

    def _safe_copy_failed(self, event: ev.CommandFailed, now_s: float) -> Sequence[Command]:
        return ()


class TakesTheSafeCopyAway(SimSourceMover):
    def _retire(self) -> None:
        self._remove_copy()
        super()._retire()


class SaysNothingOfPagesInItsLastWord(SimDestinationMover):
    def update(self) -> Update:
        said = super().update()
        return replace(said, lacks_nothing=False, paged=False) if self.machine.finished else said


class LeavesTheSafeCopy(SimDestinationMover):
    def _paged(self) -> None:
        files = self.world.safe_copy
        there, files.there = files.there, False
        super()._paged()
        files.there = there


# --- back from a destination that is lost ------------------------------------------------------------


class GoesOnWithoutTheRegister(FreeSource):
    def _take_back(self, now_s: float) -> Sequence[Command]:
        return self._revive_won(ev.SwapWon(), now_s)


class TakesNoAnswerForARevival(FreeSource):
    table: ClassVar = changed(
        SourceMachine.table,
        (S.REVIVING, ev.SwapUnknown, "_revive_unknown"),
        (S.REVIVING, ev.SwapRefused, "_revive_unknown"),
    )

    def _revive_unknown(self, event: Event, now_s: float) -> Sequence[Command]:
        return self._revive_won(event, now_s)


class AsksForItsVmOnce(FreeSource):
    def _tick_reviving(self, event: ev.Tick, now_s: float) -> Sequence[Command]:
        return ()


class TakesBackWithADeadQemu(FreeSource):
    def _qemu_died_undecided(self, event: ev.QemuDied, now_s: float) -> Sequence[Command]:
        return (
            () if self.state in (S.COMMITTED, S.RECONNECTING) else super()._qemu_died_undecided(event, now_s)
        )


class SuccessorForgetsThatItTakesBack(SimSourceMover):
    def begin(self, predecessor_state: str | None) -> None:
        super().begin("paging" if predecessor_state == S.REVIVING else predecessor_state)


class RunsOnWhenItWasTakenBack(FreeDestination):
    def _end_what_was_taken_back(self) -> Sequence[Command]:
        return ()


class ForgetsWhatWasTaken(SimController):
    def swap_asked(self, expected: Side, wanted: Side) -> None:
        return


class SaysOnceWhatBelongsToOthers(SimController):
    def heartbeat(self, side: Side, has_vm: bool) -> bool:
        disowned = super().heartbeat(side, has_vm)
        self._doubtful.clear()
        return disowned


class BelievesWhoWasTakenFrom(SimController):
    @property
    def _is_taken_back(self) -> bool:
        return False


class BelievesThatWhatHasEndedHasEnded(SimController):
    def _add_late(self, update: Update) -> None:
        return


BROKEN_PAGING: dict[str, Parts] = {
    part.__name__: Parts(source=part)
    for part in (
        RetiresWhenTheLinkBreaks,
        RetiresWhenTheDestinationRuns,
        RetiresWhenCancelledAmidPaging,
        RetiresWhenItHasLostTheRegister,
        TakesAFailedSearchForAnEnd,
        DoesNotBelieveThatSomethingIsMissing,
        NeverLooksAgain,
        NeverAsksWhetherAllIsOver,
        PushesNothing,
        SuccessorForgetsThatItOwes,
        TakesAnEndedRecordForAnEnd,
        WaitsForLostPages,
        LosesPagesWithoutAsking,
        WaitsForPagesOfAMemoryThatIsGone,
        IsFreedBeforeTheComparison,
        SaysNothingOfADifference,
        GoesOnWithoutTheRegister,
        TakesNoAnswerForARevival,
        AsksForItsVmOnce,
        TakesBackWithADeadQemu,
    )
}
BROKEN_PAGING |= {
    part.__name__: Parts(destination=part)
    for part in (
        RunsWithPagesMissing,
        SaysPagedTooEarly,
        SuccessorForgetsThatItLacksPages,
        WaitsForPagesThatAreLost,
        DoesNotCountAsAloneBeforePaging,
        FinishesWhenTheSourceIsLost,
        NeverGivesUp,
        DoesNotNoticeThatAllIsHere,
        TakesADifferenceForAnEqual,
        ComparesOnceOnly,
        NeverLooksIntoTheSafeCopy,
        LooksIntoTheSafeCopyOnce,
        RunsOnWhenItWasTakenBack,
    )
}
BROKEN_PAGING |= {
    part.__name__: Parts(source_mover=part)
    for part in (
        TakesTheSafeCopyAway,
        SuccessorForgetsThatItTakesBack,
    )
}
BROKEN_PAGING |= {
    part.__name__: Parts(destination_mover=part)
    for part in (
        PlacesWhatComesTwice,
        SuccessorForgetsWhatWasPlaced,
        LetsTheVmReadZeros,
        LeavesTheSafeCopy,
        SaysNothingOfPagesInItsLastWord,
    )
}
BROKEN_PAGING |= {
    part.__name__: Parts(controller=part)
    for part in (
        ForgetsWhatWasTaken,
        SaysOnceWhatBelongsToOthers,
        BelievesWhoWasTakenFrom,
        BelievesThatWhatHasEndedHasEnded,
    )
}
