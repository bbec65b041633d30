"""The controller: the record of the migration, who was heard from, and the word that ends it.

It plays what `transhume.farm` does with reports, heartbeats and silence, on limits that are shortened so that
a seed need not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from transhume.migration import events as ev
from transhume.model.errors import PagesLost
from transhume.model.migration import NOWHERE, Outcome, Phase
from transhume.sim.plan import Plan, Side
from transhume.sim.register import SimRegister
from transhume.sim.schedule import Schedule

SILENT_AFTER_S = 3.0
LAST_WORD_S = 3.0
OVERDUE_S = 30.0
SWEEP_S = 1.0
_PHASES = list(Phase)


@dataclass(frozen=True)
class Update:
    """What an end says of the migration. `lacks_nothing`: that no page is missing at the destination any
    more, `paged`: and that none is still to be verified.
    """

    side: Side
    phase: Phase
    outcome: Outcome
    runs_at: str
    error_code: str = ""
    error: str = ""
    lacks_nothing: bool = False
    paged: bool = False


@dataclass(frozen=True)
class Record:
    """What the farm has in its store, and shows to people."""

    outcome: Outcome = Outcome.RUNNING
    phase: Phase = Phase.REQUESTED
    runs_at: str = f"source host {Side.SOURCE}"
    error_code: str = ""
    error: str = ""
    lacks_nothing: bool = False
    paged: bool = False

    @property
    def ended(self) -> bool:
        """Whether the migration is over."""
        return self.outcome is not Outcome.RUNNING


class SimController:
    """Of one migration. What it keeps in memory dies with the daemon that it lives in; the record does not.

    `dismiss` is called when the controller has given the migration up: both ends should hear of it.
    """

    def __init__(self, plan: Plan, schedule: Schedule, register: SimRegister, first_epoch: int) -> None:
        self.record = Record()
        self.lives: Callable[[], bool] = lambda: True
        self.dismiss: Callable[[], None] | None = None
        self.log: Callable[[str], None] | None = None
        self._schedule = schedule
        self._register = register
        self._epoch = first_epoch
        self._overdue_s = plan.options.deadline_s + OVERDUE_S
        self._heard_s = 0.0
        self._last_word: tuple[float, Update] | None = None
        self._seen_s: dict[Side, float] = {}
        self._active: dict[Side, bool] = {}
        self._doubtful: set[Side] = set()

    def start(self) -> None:
        """Look after the migration from now on."""
        self._schedule.after(SWEEP_S, self._sweep)

    def restart(self) -> None:
        """It had died, and is back: what it had in memory is gone."""
        self._heard_s = self._schedule.now_s
        self._last_word = None
        self._seen_s.clear()
        self._active.clear()
        self._doubtful.clear()

    @property
    def known(self) -> ev.MigrationKnown:
        """The answer to who asks for the record and for the register."""
        record = self.record
        return ev.MigrationKnown(
            going_on=not record.ended,
            paged=record.paged,
            lacks_nothing=record.lacks_nothing,
            pages_lost=record.error_code == PagesLost.code,
            failed=record.outcome is Outcome.FAILED,
            revoked=self._register.epoch > self._epoch + 1,
        )

    @property
    def _is_taken_back(self) -> bool:
        return (self._register.owner, self._register.epoch) == (Side.SOURCE, self._epoch + 2)

    @property
    def committed(self) -> bool:
        """Whether the register gives the VM to the destination, in the epoch of this migration."""
        return (self._register.owner, self._register.epoch) == (Side.DESTINATION, self._epoch + 1)

    def swap_asked(self, expected: Side, wanted: Side) -> None:
        """Whether it is made or not: who loses a VM by it is asked for it at the next heartbeat."""
        if expected is not wanted:
            self._doubtful.add(expected)

    # --- heartbeats ------------------------------------------------------------------------------

    def silent(self, side: Side) -> bool:
        """Whether a host was not heard from for too long."""
        seen_s = self._seen_s.get(side)
        return seen_s is None or self._schedule.now_s - seen_s > SILENT_AFTER_S

    def heartbeat(self, side: Side, has_vm: bool) -> bool:
        """A host lives, and has a QEMU of the VM or has not; the answer: whether that one is another's."""
        doubtful = has_vm and (self.silent(side) or not self._active.get(side) or side in self._doubtful)
        self._seen_s[side], self._active[side] = self._schedule.now_s, has_vm
        disowned = doubtful and self._register.owner is not side
        (self._doubtful.add if disowned else self._doubtful.discard)(side)
        return disowned

    def hear_of_progress(self) -> None:
        """A mover has reported, nothing new perhaps."""
        self._heard_s = self._schedule.now_s

    # --- reports ---------------------------------------------------------------------------------

    def report(self, update: Update) -> bool:
        """Take what an end says; False when the store has no room now and it must be said again."""
        if self.record.ended:
            self._add_late(update)
            return True
        self._heard_s = self._schedule.now_s
        if update.outcome is Outcome.RUNNING:
            self.record = self._merged(update)
            return True
        if update.side is Side.DESTINATION and self._is_taken_back:
            return True  # refused: only the source knows how that ended
        if update.side is Side.SOURCE:
            said = None if self._last_word is None else self._last_word[1]
            if said is not None and said.runs_at.startswith(NOWHERE):
                return self.end(replace(said, phase=update.phase))
            return self.end(update)
        if update.outcome is Outcome.FAILED and update.phase is Phase.DONE:
            return self.end(update)
        if update.outcome is Outcome.COMPLETED and not self.committed:
            return True  # refused: the register knows better
        self._last_word = (self._schedule.now_s, update)
        self.record = self._merged(update)
        return True

    def _add_late(self, update: Update) -> None:
        """Of a migration that has ended: that it was lost after all, or that it was not."""
        record = _joined(self.record, update)
        back = update.side is Side.SOURCE and update.outcome is Outcome.FAILED and self._is_taken_back
        if back or (record.outcome is Outcome.COMPLETED and _lost_after_commit(update)):
            record = replace(
                record,
                outcome=Outcome.FAILED,
                error_code=update.error_code,
                error=update.error,
                runs_at=update.runs_at,
            )
        by_destination = update.side is Side.DESTINATION and update.outcome is not Outcome.RUNNING
        if record.error_code == PagesLost.code and by_destination and update.lacks_nothing:
            record = replace(
                record,
                outcome=update.outcome,
                error_code=update.error_code,
                error=update.error,
                runs_at=update.runs_at,
            )
        self._keep(record)

    def _merged(self, update: Update) -> Record:
        phase = self.record.phase
        if update.phase not in (Phase.DONE, Phase.ABORTED):
            phase = max(phase, update.phase, key=_PHASES.index)
        return replace(_joined(self.record, update), phase=phase)

    # --- ends ------------------------------------------------------------------------------------

    def end(self, claim: Update) -> bool:
        """End the record as the register and the claim have it: one transaction, that may find no room."""
        if self._register.full:
            return False
        committed = self.committed
        if claim.outcome is Outcome.COMPLETED and not committed:
            return True  # refused
        self._register.raise_epoch(self._epoch)
        outcome, phase = claim.outcome, Phase.ABORTED
        if committed:
            outcome = Outcome.FAILED if _lost_after_commit(claim) else Outcome.COMPLETED
            phase = Phase.DONE
        self._keep(
            replace(
                _joined(self.record, claim),
                outcome=outcome,
                phase=phase,
                runs_at=claim.runs_at,
                error_code=claim.error_code,
                error=claim.error,
            )
        )
        return True

    def give_up(self) -> None:
        """Nobody reports, or the source cannot begin: end it, unless it is committed; then say so."""
        if self.record.ended:
            return
        why = ("timed-out", "nobody reports")
        if self.committed:
            unknown = f"unknown until host {Side.DESTINATION} answers"
            self.end(Update(Side.DESTINATION, Phase.DONE, Outcome.COMPLETED, unknown, *why))
            return
        here = f"source host {Side.SOURCE}"
        ended = self.end(Update(Side.SOURCE, Phase.ABORTED, Outcome.FAILED, here, *why))
        if ended and self.dismiss is not None:
            self.dismiss()

    def _sweep(self) -> None:
        self._schedule.after(SWEEP_S, self._sweep)
        if self.record.ended or not self.lives():
            return
        now_s = self._schedule.now_s
        if self._last_word is not None and now_s - self._last_word[0] > LAST_WORD_S:
            self.end(self._last_word[1])
        elif now_s - self._heard_s > self._overdue_s:
            self.give_up()

    def _keep(self, record: Record) -> None:
        if self.log is not None and record != self.record:
            self.log(f"record: {record}")
        self.record = record


def _lost_after_commit(update: Update) -> bool:
    return update.outcome is Outcome.FAILED and update.phase is Phase.DONE


def _joined(record: Record, update: Update) -> Record:
    """What was known once is known for good."""
    return replace(
        record,
        lacks_nothing=record.lacks_nothing or update.lacks_nothing,
        paged=record.paged or update.paged,
    )
