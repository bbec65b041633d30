"""Migrations that wait for an earlier one of the same VM: one for each VM at most.

While pages are owed the VM runs at its destination, and it cannot leave before the last page has come. What
is asked for then is entered in the store and waits there, under an id of its own. The VM's record names it
beside the one under way, and keeps it when that one ends, so that nobody can come in between. What it will
meet is only known when it begins: until then its record says where the VM runs now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from transhume.farm.admission import Admission
from transhume.farm.endings import Claim, at_source
from transhume.farm.members import Members
from transhume.farm.preflight import destination_reasons, queued_already
from transhume.farm.records import FarmRecords, VmRecord, absent, encode, migration_key, vm_key
from transhume.farm.survey import Entrance, Survey, survey
from transhume.farm.vms import Vms
from transhume.model.errors import Conflict, NotFound, PreflightFailed, StoreError, TranshumeError
from transhume.model.migration import Migration, MigrationOptions, Outcome, Phase
from transhume.model.orders import SourceFacts
from transhume.model.vm import Vm


class Queue:
    """The migrations in phase `queued`, in the store. Who follows them in memory is told what became of each.

    Every method raises `StoreError`; the same call may be made again then.
    """

    def __init__(
        self,
        records: FarmRecords,
        members: Members,
        vms: Vms,
        clock_s: Callable[[], float],
        new_id: Callable[[], str],
        admission: Admission,
    ) -> None:
        self._records = records
        self._members = members
        self._vms = vms
        self._clock_s = clock_s
        self._new_id = new_id
        self._admission = admission

    async def enter(
        self, vm: Vm, earlier: Migration, to: str | None, options: MigrationOptions
    ) -> Migration | None:
        """Let a migration wait for `earlier`, which moves `vm`; without `to` its destination is chosen later.

        None: the earlier one has ended meanwhile. Raises `Conflict` when another waits already, `NotFound`
        for a host or VM that is none, `PreflightFailed` for the host where the VM runs by now.
        """
        self._demand_elsewhere(vm, earlier, to, options)
        while True:
            kept = await self._records.vm(earlier.vm)
            if kept is None:
                raise NotFound(f"VM {earlier.vm} was deleted meanwhile")
            if kept.record.queued:
                raise Conflict(queued_already(earlier.vm, kept.record.queued))
            if kept.record.migration != earlier.id:
                return None
            queued = Migration(
                id=self._new_id(),
                vm=earlier.vm,
                source=earlier.destination,
                destination=to or "",
                epoch=earlier.epoch + 1,
                options=options,
                phase=Phase.QUEUED,
                behind=earlier.id,
                created_at_s=self._clock_s(),
            )
            queued = queued.model_copy(update={"runs_at": at_source(queued)})
            done = await self._records.store.transact(
                compares=[kept.unchanged, absent(migration_key(queued.id))],
                puts={
                    migration_key(queued.id): encode(queued),
                    kept.key: encode(kept.record.model_copy(update={"queued": queued.id})),
                },
            )
            if done is not None:
                return queued

    async def examine(self, queued: Migration) -> Survey | Claim | None:
        """Look whether a migration can begin: the survey without a reason against it, or how it ends instead.

        None: the earlier one is still under way.
        """
        kept = await self._records.migration(queued.behind)
        if kept is not None and kept.record.outcome is Outcome.RUNNING:
            return None
        if kept is not None and kept.record.outcome is not Outcome.COMPLETED:
            return _after(queued, kept.record)
        view = await self._vms.show(queued.vm)
        try:
            to, entrance = queued.destination or None, Entrance(self._admission)
            found = await survey(self._members, view, to, queued.options, entrance)
            found.demand_clear()
        except StoreError:
            raise
        except TranshumeError as error:
            reasons = error.reasons if isinstance(error, PreflightFailed) else ()
            words = ": ".join((error.message, "; ".join(reasons))) if reasons else error.message
            return Claim(
                outcome=Outcome.FAILED,
                error_code=error.code,
                error=f"migration {queued.id} could not begin after {queued.behind}: {words}",
                runs_at=f"source host {view.ownership.owner}",
            )
        return found

    async def begin(self, queued: Migration, found: Survey) -> Migration | None:
        """Make a queued migration the one under way, as `request` would have: only one can win.

        None: it does not wait any more, or the VM was changed since the survey.
        """
        destination = found.demand_clear()
        vm, owner, kept = await asyncio.gather(
            self._records.vm(queued.vm),
            self._records.ownership(queued.vm),
            self._records.migration(queued.id),
        )
        if vm is None or owner is None or kept is None or kept.record.phase is not Phase.QUEUED:
            return None
        if vm.record.migration or vm.record.queued != queued.id or owner.record != found.vm.ownership:
            return None
        begun = kept.record.model_copy(
            update={
                "phase": Phase.REQUESTED,
                "source": found.source.name,
                "destination": destination.name,
                "epoch": owner.record.epoch,
            }
        )
        begun = begun.model_copy(update={"runs_at": at_source(begun)})
        marked = vm.record.model_copy(update={"migration": begun.id, "queued": ""})
        done = await self._records.store.transact(
            compares=[vm.unchanged, owner.unchanged, kept.unchanged],
            puts={kept.key: encode(begun), vm.key: encode(marked)},
        )
        return begun if done is not None else None

    async def end(self, queued: Migration, claim: Claim) -> Migration:
        """End a migration that never began and make room for another. One that waits no more is left alone;
        its record comes back as it is.
        """
        while True:
            kept = await self._records.migration(queued.id)
            vm = await self._records.vm(queued.vm)
            if kept is None:
                raise NotFound(f"migration {queued.id} is no longer in the farm's store")
            if kept.record.phase is not Phase.QUEUED:
                return kept.record
            ended = kept.record.model_copy(
                update={
                    "outcome": claim.outcome,
                    "phase": Phase.ABORTED,
                    "error_code": claim.error_code,
                    "error": claim.error,
                    "runs_at": claim.runs_at or kept.record.runs_at,
                    "ended_at_s": self._clock_s(),
                }
            )
            compares, puts = [kept.unchanged], {kept.key: encode(ended)}
            if vm is not None and vm.record.queued == queued.id:
                compares.append(vm.unchanged)
                puts[vm_key(queued.vm)] = encode(_without_queued(vm.record))
            if await self._records.store.transact(compares=compares, puts=puts) is not None:
                return ended

    def _demand_elsewhere(
        self, vm: Vm, earlier: Migration, to: str | None, options: MigrationOptions
    ) -> None:
        """Refuse what can never begin: it would go where the VM is by then."""
        if to is None:
            return
        source, destination = self._members.host(earlier.destination), self._members.host(to)
        if destination.name == source.name:
            facts = SourceFacts(state=vm.state, spec=vm.spec)
            raise PreflightFailed(
                f"VM {earlier.vm} cannot move to {to}; it runs there already",
                destination_reasons(vm, source, facts, destination, None, options),
            )


def _after(queued: Migration, earlier: Migration) -> Claim:
    """What a migration ends with whose predecessor did not bring the VM to its destination, whole."""
    why = f": {earlier.error}" if earlier.error else ""
    return Claim(
        outcome=Outcome.FAILED,
        error_code=earlier.error_code,
        error=f"migration {queued.id} was queued behind {earlier.id}, which ended as "
        f"{earlier.outcome.value}{why}",
        runs_at=earlier.runs_at,
    )


def _without_queued(vm: VmRecord) -> VmRecord:
    return vm.model_copy(update={"queued": ""})
