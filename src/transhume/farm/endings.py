"""How a migration ends: one transaction that writes the outcome, frees the VM, and compares the register.

The register alone tells whether it was committed: only if it holds `(destination, epoch + 1)`. Then it is
completed, unless an end says that the VM, or pages of it, were lost after that. A migration that failed
while the register still holds `(source, epoch)` could be committed by a destination that has not heard of
it, so the same transaction raises the epoch: from then on no commit of it can win.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transhume.farm.members import Members
from transhume.farm.merge import join_reports, merged
from transhume.farm.records import FarmRecords, VmRecord, encode, migration_key, ownership_key, vm_key
from transhume.model.errors import Conflict, NotFound, PagesLost
from transhume.model.migration import NOWHERE, Migration, Outcome, Phase
from transhume.model.orders import MigrationUpdate
from transhume.model.vm import Ownership, VmState


@dataclass(frozen=True)
class Claim:
    """What somebody says of the end. `update` is the report of a host, None when the controller gives up."""

    outcome: Outcome
    error_code: str = ""
    error: str = ""
    runs_at: str = ""
    update: MigrationUpdate | None = None

    @classmethod
    def reported(cls, update: MigrationUpdate) -> Claim:
        return cls(update.outcome, update.error_code, update.error, update.runs_at, update)


class Endings:
    """Ends migrations in the store."""

    def __init__(self, records: FarmRecords, members: Members, clock_s: Callable[[], float]) -> None:
        self._records = records
        self._members = members
        self._clock_s = clock_s

    async def end(self, record: Migration, claim: Claim) -> Migration | None:
        """End `record` (its newest state in memory) as the register and the claim have it.

        Returns the ended record, or None when the controller wanted to give up what is committed already: it
        goes on then. Raises `Conflict` when a host claims a completion that the register does not know, and
        `StoreError`, after which the same call may be made again.
        """
        while True:
            kept = await self._records.migration(record.id)
            owner = await self._records.ownership(record.vm)
            vm = await self._records.vm(record.vm)
            if kept is None or owner is None:
                raise NotFound(
                    f"migration {record.id} or its VM {record.vm} is no longer in the farm's store"
                )
            if kept.record.outcome is not Outcome.RUNNING:
                return kept.record
            committed = _demand_possible(record, claim, owner.record)
            if committed and claim.update is None and claim.outcome is not Outcome.COMPLETED:
                return None
            ended = self._ended(record, claim, committed)
            compares = [kept.unchanged, owner.unchanged]
            puts = {migration_key(record.id): encode(ended)}
            if owner.record == Ownership(owner=record.source, epoch=record.epoch):
                puts[ownership_key(record.vm)] = encode(
                    Ownership(owner=record.source, epoch=record.epoch + 1)
                )
            if vm is not None and vm.record.migration == record.id:
                compares.append(vm.unchanged)
                puts[vm_key(record.vm)] = encode(_freed(vm.record))
            if await self._records.store.transact(compares=compares, puts=puts) is not None:
                self._note_states(ended)
                return ended

    async def committed(self, record: Migration) -> bool:
        """Whether the register gives the VM to the destination."""
        owner = await self._records.ownership(record.vm)
        return owner is not None and _is_commit(record, owner.record)

    async def check(self, record: Migration, claim: Claim) -> None:
        """Raise `Conflict` when `end` would, and change nothing."""
        owner = await self._records.ownership(record.vm)
        if owner is not None:
            _demand_possible(record, claim, owner.record)

    async def add_late_report(self, update: MigrationUpdate) -> None:
        """Join what the other end says into a record that has ended.

        Its report is added; and that the VM was lost after all, when nobody had heard of it before; or that
        no page of it was, when the destination had found elsewhere what its source had lost (what it says of
        the end is true then, also that the memory differs); or that it was taken back from the destination
        while the controller, which had heard nothing, ended the record.
        """
        while True:
            kept = await self._records.migration(update.migration)
            if kept is None:
                return
            changes: dict[str, object] = {}
            if update.report is not None:
                changes["report"] = join_reports(kept.record.report, update.report)
            claim = Claim.reported(update)
            lost = kept.record.outcome is Outcome.COMPLETED and _lost_after_commit(claim)
            if lost or await self._was_taken_back(kept.record, claim):
                changes |= {
                    "outcome": Outcome.FAILED,
                    "error_code": claim.error_code,
                    "error": claim.error,
                    "runs_at": claim.runs_at,
                }
            if kept.record.error_code == PagesLost.code and _found_elsewhere(kept.record, claim):
                changes |= {
                    "outcome": claim.outcome,
                    "error_code": claim.error_code,
                    "error": claim.error,
                    "runs_at": claim.runs_at,
                }
            record = kept.record.model_copy(update=changes)
            if record == kept.record:
                return
            done = await self._records.store.transact(
                compares=[kept.unchanged], puts={kept.key: encode(record)}
            )
            if done is not None:
                return

    async def _was_taken_back(self, record: Migration, claim: Claim) -> bool:
        """Whether this is the word of a source that has its VM again, and the record does not say so."""
        by_source = claim.update is not None and claim.update.host == record.source
        if not by_source or claim.outcome is not Outcome.FAILED or claim.runs_at == record.runs_at:
            return False
        owner = await self._records.ownership(record.vm)
        return owner is not None and _is_taken_back(record, owner.record)

    def _ended(self, record: Migration, claim: Claim, committed: bool) -> Migration:
        joined = record if claim.update is None else merged(record, claim.update)
        runs_at = claim.runs_at or (at_destination(record) if committed else at_source(record))
        error = claim.error
        if not committed:
            outcome, phase = claim.outcome, Phase.ABORTED
            if error and runs_at not in error:
                error = f"{error.rstrip('. ')}. {_place_in_words(record.vm, runs_at, error)}"
        else:
            outcome, phase = Outcome.FAILED if _lost_after_commit(claim) else Outcome.COMPLETED, Phase.DONE
        return joined.model_copy(
            update={
                "outcome": outcome,
                "phase": phase,
                "runs_at": runs_at,
                "error": error,
                "error_code": claim.error_code,
                "ended_at_s": self._clock_s(),
            }
        )

    def _note_states(self, ended: Migration) -> None:
        if ended.outcome is Outcome.COMPLETED and not ended.error:
            self._members.note_vm_state(ended.destination, ended.vm, VmState.RUNNING)
            self._members.note_vm_state(ended.source, ended.vm, VmState.STOPPED)


def at_source(record: Migration) -> str:
    """Where a VM runs that was not moved, in words."""
    return f"source host {record.source}"


def at_destination(record: Migration) -> str:
    """Where a VM runs that was moved, in words."""
    return f"destination host {record.destination}"


def _place_in_words(vm: str, runs_at: str, error: str) -> str:
    """Where a VM runs that was not moved, as a sentence behind what ended its migration."""
    if not runs_at.startswith(NOWHERE):
        return f"VM {vm} runs on {runs_at}, where it was"
    nowhere, _, why = runs_at.partition(": ")
    return f"VM {vm} runs {nowhere if why in error else runs_at}"


def _is_commit(record: Migration, held: Ownership) -> bool:
    return held == Ownership(owner=record.destination, epoch=record.epoch + 1)


def _is_taken_back(record: Migration, held: Ownership) -> bool:
    return held == Ownership(owner=record.source, epoch=record.epoch + 2)


def _demand_possible(record: Migration, claim: Claim, held: Ownership) -> bool:
    """Whether the register holds the commit. Raises `Conflict` for a completion claimed without one, and for
    whatever a destination says of a VM that was taken back from it: only the source knows how that ended.
    """
    committed = _is_commit(record, held)
    by = record.source if claim.update is None else claim.update.host
    if by == record.destination and _is_taken_back(record, held):
        raise Conflict(
            f"VM {record.vm} was taken back from host {record.destination} in epoch {held.epoch}: how "
            f"migration {record.id} ended is for host {record.source} to say"
        )
    if claim.outcome is Outcome.COMPLETED and not committed:
        raise Conflict(
            f"migration {record.id} is reported as completed, but the register gives VM {record.vm} to "
            f"{held.owner} in epoch {held.epoch}"
        )
    return committed


def _lost_after_commit(claim: Claim) -> bool:
    """Whether an end says that the VM was lost although it had moved: with its QEMU, or with pages it
    lacked.
    """
    update = claim.update
    return claim.outcome is Outcome.FAILED and update is not None and update.phase is Phase.DONE


def _found_elsewhere(record: Migration, claim: Claim) -> bool:
    """Whether the destination has ended and says that it lacks nothing, whatever its source believed."""
    update = claim.update
    if update is None or update.host != record.destination or claim.outcome is Outcome.RUNNING:
        return False
    paging = None if update.report is None else update.report.paging
    return paging is not None and paging.complete


def _freed(vm: VmRecord) -> VmRecord:
    return vm.model_copy(update={"migration": ""})
