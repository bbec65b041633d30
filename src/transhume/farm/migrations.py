"""Migrations as the controller sees them: asked for, set up, reported on, and ended by the register's word.

The controller only introduces the two ends to each other (steps 1 to 4 of the patent's figure 3). From
`begin` on the movers go on by themselves and report; the controller may die and come back meanwhile. What it
never does is to decide by itself where a VM runs: every end is one transaction that compares the register.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

from transhume.farm.admission import Admission
from transhume.farm.dry_run import dry_run
from transhume.farm.endings import Claim, Endings, at_destination, at_source
from transhume.farm.events import EventLog, MigrationEvent
from transhume.farm.limits import Limits
from transhume.farm.members import Members
from transhume.farm.merge import merged
from transhume.farm.preflight import moving_already, queued_already
from transhume.farm.queue import Queue
from transhume.farm.records import FarmRecords, absent, encode, migration_key, vm_key
from transhume.farm.survey import Entrance, Survey, survey
from transhume.farm.vms import Vms
from transhume.model.errors import (
    Conflict,
    HostLost,
    NotFound,
    Refused,
    StoreError,
    TimedOut,
    TranshumeError,
)
from transhume.model.migration import NOWHERE, DryRun, Migration, MigrationOptions, Outcome, Phase
from transhume.model.orders import Adjustment, BeginOrder, CancelReply, MigrationUpdate, PrepareOrder
from transhume.model.vm import Vm

log = logging.getLogger(__name__)


class Migrations:
    """All migrations of the farm. Those under way are kept in memory too: progress is not worth an fsync."""

    def __init__(
        self,
        records: FarmRecords,
        members: Members,
        vms: Vms,
        events: EventLog,
        clock_s: Callable[[], float],
        new_id: Callable[[], str],
        limits: Limits,
        admission: Admission,
    ) -> None:
        self._records = records
        self._members = members
        self._vms = vms
        self._events = events
        self._clock_s = clock_s
        self._new_id = new_id
        self._limits = limits
        self._endings = Endings(records, members, clock_s)
        self._admission = admission
        self._queue = Queue(records, members, vms, clock_s, new_id, admission)
        self._live: dict[str, Migration] = {}
        self._heard_at_s: dict[str, float] = {}
        self._setups: dict[str, asyncio.Task[None]] = {}
        self._last_words: dict[str, tuple[float, Claim]] = {}
        self._beginning: dict[str, asyncio.Lock] = {}
        self._begun: set[str] = set()

    async def start(self) -> None:
        """Take up the migrations that an earlier controller left; their movers report by themselves."""
        for kept in await self._records.migrations():
            if kept.record.outcome is Outcome.RUNNING:
                self._live[kept.record.id] = kept.record
                self._heard_at_s[kept.record.id] = self._clock_s()
                if kept.record.phase not in (Phase.QUEUED, Phase.REQUESTED):
                    self._begun.add(kept.record.id)

    async def close(self) -> None:
        """Stop setting up. Migrations under way go on; one half set up is given up after the next start."""
        setups = list(self._setups.values())
        for task in setups:
            task.cancel()
        await asyncio.gather(*setups, return_exceptions=True)

    async def request(
        self, vm: str, to: str | None, options: MigrationOptions, leaving: frozenset[str] = frozenset()
    ) -> Migration:
        """Step 1: check, enter the migration in the store, and set it up in the background.

        While an earlier one of the VM owes pages, it is queued: it begins, and is checked, after that one.
        Where the `leaving` VMs of its host are breaks no rule. Raises `PreflightFailed` with all reasons,
        `Conflict` with the id of the one under way or queued, `NotFound`, `HostLost`: nothing has changed.
        """
        view = await self._vms.show(vm)
        if view.migration or view.queued:
            queued = await self._request_queued(view, to, options)
            if queued is not None:
                return queued
            view = await self._vms.show(vm)
        found = await survey(self._members, view, to, options, Entrance(self._admission, leaving))
        found.demand_clear()
        migration = await self._enter(found, options)
        self._in_background(migration.id, self._set_up(found, migration))
        return migration

    async def dry_run(self, vm: str, to: str | None, options: MigrationOptions) -> DryRun:
        """What a migration would meet. Changes nothing; takes as long as the sample of the dirty rate."""
        view, behind = await self._vms.show(vm), ""
        if view.migration and not view.queued and (await self.get(view.migration)).phase is Phase.PAGING:
            # It would be queued: that the VM moves now is nothing against it.
            view, behind = view.model_copy(update={"migration": ""}), view.migration
        sample_s, entrance = self._limits.sample_s, Entrance(self._admission, hold=False)
        answer = await dry_run(self._members, self._records, view, to, options, sample_s, entrance)
        return answer.model_copy(update={"behind": behind})

    async def get(self, migration: str) -> Migration:
        """The record, with the newest progress. Raises `NotFound`."""
        live = self._live.get(migration)
        if live is not None:
            return live
        kept = await self._records.migration(migration)
        if kept is None:
            raise NotFound(f"there is no migration {migration}; `transhume migrations` lists them")
        return kept.record

    async def list(self, limit: int = 100) -> list[Migration]:
        """The latest `limit` of them, the oldest of those first."""
        kept = await self._records.migrations()
        records = [self._live.get(entry.record.id, entry.record) for entry in kept]
        return sorted(records, key=lambda record: (record.created_at_s, record.id))[-limit:]

    def under_way(self) -> tuple[Migration, ...]:
        """Those that have begun and not ended."""
        return tuple(record for record in self._live.values() if record.phase is not Phase.QUEUED)

    async def follow(self, migration: str, after: int = 0) -> AsyncIterator[MigrationEvent]:
        """The events of one migration with a number over `after`, ending with the one that ended it.

        Begins with the record as it is now unless the caller has seen all there was. Raises `NotFound`.
        """
        record, last_id = await self.get(migration), self._events.last_id
        if after < last_id or record.outcome is not Outcome.RUNNING:
            yield MigrationEvent(id=last_id, migration=record)
        if record.outcome is not Outcome.RUNNING:
            return
        async for event in self._events.follow(last_id, migration):
            yield event
            if event.migration.outcome is not Outcome.RUNNING:
                return

    async def report(self, update: MigrationUpdate) -> None:
        """What an end says of a migration. Saying it twice, late or out of order does no harm.

        The source has the last word, because it has measured the most; a destination's is kept and taken
        when the source says nothing for a while.

        Raises `NotFound` for an unknown migration, `Refused` for a host that has no part in it, `Conflict`
        for an outcome that the register contradicts, and `StoreError`: say it again then.
        """
        record = await self.get(update.migration)
        if update.host not in (record.source, record.destination):
            raise Refused(f"host {update.host} has no part in migration {update.migration}")
        if record.outcome is not Outcome.RUNNING:
            await self._endings.add_late_report(update)
            return
        self._heard_at_s[update.migration] = self._clock_s()
        if update.outcome is Outcome.RUNNING:
            await self._note(merged(record, update), record)
            return
        claim = Claim.reported(update)
        if update.host == record.source:
            _, last_word = self._last_words.get(record.id, (0.0, None))
            if last_word is not None and last_word.runs_at.startswith(NOWHERE):
                # The source knows that it gave the VM away; only the destination knows that it was lost.
                claim = replace(last_word, update=update)
            await self._end(record, claim)
            return
        if claim.outcome is Outcome.FAILED and update.phase is Phase.DONE:
            # Lost after the commit: a source that still holds pages for it waits for this word.
            await self._end(record, claim)
            return
        await self._endings.check(record, claim)
        self._last_words[record.id] = (self._clock_s(), claim)
        await self._note(merged(record, update), record)

    async def adjust(self, reference: str, adjustment: Adjustment) -> None:
        """Give a migration under way other limits, or let it go on after the resume.

        Raises `NotFound`, `Conflict` when it has ended or does not take them, `HostLost` when the source does
        not answer. Nothing has changed then.
        """
        record = await self._find(reference)
        if record.outcome is not Outcome.RUNNING:
            raise Conflict(f"migration {record.id} has ended: {record.outcome.value}")
        if record.phase is Phase.QUEUED:
            raise Conflict(f"migration {record.id} waits for {record.behind} and has no limits to change yet")
        reply = await self._members.link(record.source).adjust(record.id, adjustment)
        if not reply.accepted:
            raise Conflict(f"migration {record.id} cannot be changed like this: {reply.message}")

    async def cancel(self, reference: str) -> CancelReply:
        """Give up a migration, named by its id or by its VM; after the commit, say where the VM runs.

        Of a VM with a migration under way and one queued behind it, the queued one is given up. Raises
        `NotFound`, `Conflict` when the VM is not moving, `HostLost` when the source does not answer.
        """
        record = await self._find(reference, queued_first=True)
        return (await self._cancel(record)).model_copy(update={"migration": record.id})

    async def _cancel(self, record: Migration) -> CancelReply:
        if record.outcome is not Outcome.RUNNING:
            return CancelReply(accepted=False, runs_at=record.runs_at)
        async with self._beginning.setdefault(record.id, asyncio.Lock()):
            # The set-up may have come further, or to its end, while this waited.
            record = await self.get(record.id)
            if record.outcome is not Outcome.RUNNING:
                return CancelReply(accepted=False, runs_at=record.runs_at)
            if record.phase is Phase.QUEUED:
                return await self._cancel_queued(record)
            if record.id not in self._begun:
                return await self._cancel_here(record)
        try:
            return await self._members.link(record.source).cancel(record.id)
        except NotFound:
            return await self._cancel_here(record)
        except HostLost as error:
            if await self._endings.committed(record):
                return CancelReply(accepted=False, runs_at=at_destination(record))
            raise HostLost(
                f"host {record.source} does not answer ({error.message}); where VM {record.vm} runs is "
                "unknown until it does"
            ) from error

    async def of_vm(self, vm: str) -> Migration:
        """The migration under way of a VM, or else the one that is about to begin. Raises `NotFound`, and
        `Conflict` when it is not moving.
        """
        return await self._find(vm)

    async def sweep(self) -> None:
        """End the migrations that nobody has reported on for too long, and begin those whose turn it is.
        Called again and again.
        """
        now_s = self._clock_s()
        for record in list(self._live.values()):
            if record.phase is Phase.QUEUED:
                self._take_turn(record)
                continue
            said_at_s, claim = self._last_words.get(record.id, (now_s, None))
            if claim is not None and now_s - said_at_s > self._limits.last_word_s:
                await self._end(record, claim)
                continue
            if self._is_preparing(record):
                continue
            unset = record.phase in (Phase.REQUESTED, Phase.PREPARED)
            limit_s = (
                self._limits.unclaimed_s if unset else record.options.deadline_s + self._limits.overdue_s
            )
            if now_s - self._heard_at_s.get(record.id, now_s) > limit_s:
                await self._end_unreported(record)

    async def _enter(self, found: Survey, options: MigrationOptions) -> Migration:
        """The migration, the VM's mark and the register's state in one transaction: only one can win."""
        vm, destination = found.vm, found.demand_clear()
        name = vm.spec.name
        while True:
            kept_vm, kept_owner = await asyncio.gather(self._records.vm(name), self._records.ownership(name))
            if kept_vm is None or kept_owner is None:
                raise NotFound(f"VM {name} was deleted meanwhile")
            if kept_vm.record.migration:
                raise Conflict(moving_already(name, kept_vm.record.migration))
            if kept_vm.record.queued:
                raise Conflict(queued_already(name, kept_vm.record.queued))
            if kept_owner.record != vm.ownership:
                raise Conflict(f"VM {name} has moved to {kept_owner.record.owner} meanwhile; ask again")
            migration = Migration(
                id=self._new_id(),
                vm=name,
                source=found.source.name,
                destination=destination.name,
                epoch=vm.ownership.epoch,
                options=options,
                created_at_s=self._clock_s(),
            )
            migration = migration.model_copy(update={"runs_at": at_source(migration)})
            done = await self._records.store.transact(
                compares=[kept_vm.unchanged, kept_owner.unchanged, absent(migration_key(migration.id))],
                puts={
                    migration_key(migration.id): encode(migration),
                    vm_key(name): encode(kept_vm.record.model_copy(update={"migration": migration.id})),
                },
            )
            if done is not None:
                self._take_up(migration)
                return migration

    async def _request_queued(self, vm: Vm, to: str | None, options: MigrationOptions) -> Migration | None:
        """Queue a migration of a VM that moves already. None: that one has ended meanwhile."""
        name = vm.spec.name
        if vm.queued:
            raise Conflict(queued_already(name, vm.queued))
        earlier = await self.get(vm.migration)
        if earlier.outcome is not Outcome.RUNNING:
            return None
        if earlier.phase is not Phase.PAGING:
            raise Conflict(moving_already(name, earlier.id))
        queued = await self._queue.enter(vm, earlier, to, options)
        if queued is not None:
            self._take_up(queued)
            # The earlier one may have ended since: then nobody else would notice.
            self._take_turn(queued)
        return queued

    def _take_turn(self, queued: Migration) -> None:
        """Begin a queued migration unless the earlier one is still under way."""
        if queued.behind not in self._live and queued.id not in self._setups:
            self._in_background(queued.id, self._begin_queued(queued))

    async def _begin_queued(self, queued: Migration) -> None:
        found = await self._queue.examine(queued)
        if found is None:
            return
        async with self._beginning.setdefault(queued.id, asyncio.Lock()):
            if queued.id not in self._live:
                return  # cancelled meanwhile
            if isinstance(found, Claim):
                self._forget(await self._queue.end(queued, found))
                return
            begun = await self._queue.begin(queued, found)
            if begun is None:
                return  # the sweep tries again
            self._take_up(begun)
        await self._set_up(found, begun)

    async def _cancel_queued(self, record: Migration) -> CancelReply:
        ended = await self._queue.end(record, Claim(outcome=Outcome.CANCELLED))
        self._forget(ended)
        return CancelReply(accepted=True, runs_at=ended.runs_at, behind=ended.behind)

    def _take_up(self, record: Migration) -> None:
        """Follow a migration that was entered in the store."""
        self._live[record.id] = record
        self._heard_at_s[record.id] = self._clock_s()
        self._events.append(record)

    def _in_background(self, migration: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"set up {migration}")
        self._setups[migration] = task
        task.add_done_callback(lambda ended: self._set_up_ended(migration, ended))

    async def _set_up(self, found: Survey, migration: Migration) -> None:
        """Steps 2 to 4: let the destination prepare, then the source begin."""
        source = self._members.link(migration.source)
        destination = self._members.link(migration.destination)
        blocks = found.facts.ram_blocks
        try:
            prepared = await destination.prepare(
                PrepareOrder(migration=migration, spec=found.facts.spec, ram_blocks=blocks)
            )
        except TranshumeError as error:
            await self._give_up(migration, error)
            return
        async with self._beginning.setdefault(migration.id, asyncio.Lock()):
            if migration.id not in self._live:
                # Cancelled while the destination prepared.
                await self._abandon(migration)
                return
            try:
                await source.begin(BeginOrder(migration=migration, prepared=prepared, ram_blocks=blocks))
            except TranshumeError as error:
                await self._give_up(migration, error)
                return
            record = self._live.get(migration.id)
            if record is not None:
                self._begun.add(migration.id)
                await self._note(_at_least(record, Phase.PREPARED), record)

    def _set_up_ended(self, migration: str, task: asyncio.Task[None]) -> None:
        self._setups.pop(migration, None)
        if not task.cancelled() and task.exception() is not None:
            # The record stays as it is; the sweep gives the migration up when nobody reports on it.
            log.error("setting up migration %s failed", migration, exc_info=task.exception())

    async def _note(self, record: Migration, before: Migration) -> None:
        """Keep a record under way. Phases go to the store before the switchover only: then time is short."""
        if record == before:
            return
        self._live[record.id] = record
        self._events.append(record)
        if record.phase is not before.phase and record.phase in (Phase.PREPARED, Phase.PRECOPY):
            try:
                await self._save(record)
            except StoreError as error:
                # A controller that restarts would know less; the migration itself misses nothing.
                log.warning("the phase of migration %s was not saved: %s", record.id, error.message)

    async def _save(self, record: Migration) -> None:
        kept = await self._records.migration(record.id)
        if kept is not None and kept.record.outcome is Outcome.RUNNING:
            await self._records.store.transact(
                compares=[kept.unchanged], puts={migration_key(record.id): encode(record)}
            )

    async def _give_up(self, record: Migration, error: TranshumeError) -> None:
        """End a migration that cannot go on, unless the destination has committed; leave nothing there."""
        claim = Claim(
            outcome=Outcome.FAILED,
            error_code=error.code,
            error=f"migration {record.id} of VM {record.vm} to {record.destination} failed: {error.message}",
        )
        if await self._end(record, claim) is not None:
            await self._dismiss(record)

    async def _end_unreported(self, record: Migration) -> None:
        """Nobody says how a migration ended: the register does, or is made to."""
        silence = TimedOut(f"neither host {record.source} nor host {record.destination} has reported on it")
        await self._give_up(record, silence)
        if record.id in self._live:
            claim = Claim(
                outcome=Outcome.COMPLETED,
                error_code=silence.code,
                error=f"the register gives {record.vm} to host {record.destination}, but {silence.message}",
                runs_at=f"unknown until host {record.destination} answers",
            )
            await self._end(record, claim)

    async def _end(self, record: Migration, claim: Claim) -> Migration | None:
        """End a migration in the store, then in memory. None: it is committed and goes on."""
        ended = await self._endings.end(self._live.get(record.id, record), claim)
        if ended is not None:
            self._forget(ended)
        return ended

    async def _cancel_here(self, record: Migration) -> CancelReply:
        claim = Claim(outcome=Outcome.CANCELLED)
        # A set-up that has not come to the source's turn finds the end by itself and cleans up behind it.
        preparing = self._is_preparing(record)
        ended = await self._end(record, claim)
        if ended is None:
            return CancelReply(accepted=False, runs_at=at_destination(record))
        if not preparing:
            await self._dismiss(record)
        return CancelReply(accepted=True, runs_at=ended.runs_at)

    async def _dismiss(self, record: Migration) -> None:
        """Tell both ends that it is over. The register refuses their commit already, heard or not."""
        await self._abandon(record)
        with suppress(TranshumeError):
            await self._members.link(record.source).cancel(record.id)

    async def _abandon(self, record: Migration) -> None:
        try:
            await self._members.link(record.destination).abandon(record.id)
        except TranshumeError as error:
            # Its own wait limit ends it there (step 3A).
            log.warning(
                "host %s could not be told to abandon %s: %s", record.destination, record.id, error.message
            )

    def _forget(self, ended: Migration) -> None:
        self._live.pop(ended.id, None)
        self._heard_at_s.pop(ended.id, None)
        self._last_words.pop(ended.id, None)
        self._beginning.pop(ended.id, None)
        self._begun.discard(ended.id)
        self._admission.let_go(ended.vm, ended.destination)
        self._events.append(ended)
        for waiting in list(self._live.values()):
            if waiting.phase is Phase.QUEUED and waiting.behind == ended.id:
                self._take_turn(waiting)

    def _is_preparing(self, record: Migration) -> bool:
        """Whether a set-up is under way that has not come to the source's turn."""
        return record.id in self._setups and record.id not in self._begun

    async def _find(self, reference: str, queued_first: bool = False) -> Migration:
        with suppress(NotFound):
            return await self.get(reference)
        kept = await self._records.vm(reference)
        if kept is None:
            raise NotFound(f"there is no migration and no VM {reference}; `transhume migrations` lists them")
        names = (kept.record.migration, kept.record.queued)
        found = next((name for name in (reversed(names) if queued_first else names) if name), None)
        if found is None:
            owner = (await self._vms.show(reference)).ownership.owner
            raise Conflict(f"VM {reference} is not moving; it belongs to {owner}")
        return await self.get(found)


def _at_least(record: Migration, phase: Phase) -> Migration:
    return merged(record, MigrationUpdate(migration=record.id, host=record.source, phase=phase))
