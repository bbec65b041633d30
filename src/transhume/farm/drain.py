"""Drains: all VMs off one host, and back again. A drain is a record in the store that is worked off.

Whoever carries the controller takes up the drains that are under way; nothing but that record is needed for
it. While a host is drained, and until it is undrained, no VM is placed on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress

from transhume.farm.admission import Admission
from transhume.farm.drain_record import (
    Drain,
    DrainKind,
    DrainOptions,
    DrainState,
    DrainStep,
    StepState,
)
from transhume.farm.drain_round import DrainRound
from transhume.farm.drain_survey import DrainSurvey
from transhume.farm.events import EventLog
from transhume.farm.limits import Limits
from transhume.farm.members import Members
from transhume.farm.migrations import Migrations
from transhume.farm.records import FarmRecords, Kept, drain_key, encode
from transhume.farm.vms import Vms
from transhume.model.errors import Conflict, NotFound, StoreError, TranshumeError
from transhume.model.host import HostState
from transhume.model.migration import Outcome

log = logging.getLogger(__name__)


class Drains:
    """The verbs of `transhume drain` and `undrain`, and the work behind them."""

    def __init__(
        self,
        records: FarmRecords,
        members: Members,
        vms: Vms,
        migrations: Migrations,
        admission: Admission,
        events: EventLog,
        clock_s: Callable[[], float],
        limits: Limits,
    ) -> None:
        self._records = records
        self._members = members
        self._migrations = migrations
        self._events = events
        self._clock_s = clock_s
        self._limits = limits
        self._survey = DrainSurvey(records, members, admission)
        self._round = DrainRound(members, vms, migrations, admission, clock_s, limits.unclaimed_s)
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up the drains that an earlier controller left."""
        self._watching = asyncio.create_task(self._watch(), name="watch migrations for drains")
        for kept in await self._records.drains():
            if not kept.record.state.over:
                self._work_on(kept.record.host)

    async def close(self) -> None:
        """Stop working. What is under way goes on, and the next controller goes on with the rest."""
        tasks = [task for task in (self._watching, *self._tasks.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._watching = None

    def wake(self) -> None:
        """Look after all drains now. Called again and again."""
        for host, task in list(self._tasks.items()):
            if task.done() and not task.cancelled() and task.exception() is not None:
                log.error("working on the drain of %s failed", host, exc_info=task.exception())
                self._work_on(host)
        for news in self._news.values():
            news.set()

    # --- verbs -------------------------------------------------------------------------------------

    async def plan(self, host: str, options: DrainOptions) -> Drain:
        """How a drain would go, its state as if it ran. Changes nothing. Raises as `begin`."""
        self._members.host(host)
        vms = await self._owned(host)
        await self._demand_another(host, vms)
        return await self._survey.plan(host, DrainKind.DRAIN, vms, options, self._clock_s())

    async def begin(self, host: str, options: DrainOptions) -> Drain:
        """Begin to move every VM off `host`; those that cannot go are in the record with their reasons.

        Raises `NotFound`, `Conflict` when it is drained already or is the last host that may have VMs, and
        `StoreError`; nothing has changed then.
        """
        async with self._lock(host):
            held = await self._records.drain(host)
            _demand_over(host, held)
            drain = await self.plan(host, options)
            if held is not None and self._goes_on(held.record):
                drain = _remembering(drain, held.record)
            await self._enter(drain, held, HostState.DRAINING)
        self._work_on(host)
        return drain

    async def show(self, host: str) -> Drain:
        """The latest drain of a host or the bringing back of its VMs, with the progress of each VM under way.

        Raises `NotFound` when there was none.
        """
        kept = await self._kept(host)
        steps = [await self._with_progress(step) for step in kept.record.steps]
        return kept.record.model_copy(update={"steps": tuple(steps)})

    async def pause(self, host: str) -> Drain:
        """Begin no further VM; what is under way goes on. Raises `Conflict` when it does not run."""
        return await self._switch(host, DrainState.RUNNING, DrainState.PAUSED)

    async def resume(self, host: str) -> Drain:
        """Go on after a pause. Raises `Conflict` when it is not paused."""
        return await self._switch(host, DrainState.PAUSED, DrainState.RUNNING)

    async def cancel(self, host: str, now: bool) -> Drain:
        """End a drain: what has moved stays, nothing more begins. With `now` what is under way is cancelled
        too, else it is left to end. Raises `Conflict` when it is over.
        """
        async with self._lock(host):
            kept = await self._kept(host)
            if kept.record.state.over:
                raise Conflict(f"the drain of {host} is over: {kept.record.state}")
            cancelling = kept.record.model_copy(update={"state": DrainState.CANCELLING})
            await self._save(kept, cancelling)
        if now:
            for step in cancelling.moving:
                # One that is past its commit has moved, and one that has ended is over: both are told later.
                with suppress(TranshumeError):
                    await self._migrations.cancel(step.migration)
        self._work_on(host)
        self.wake()
        return await self.show(host)

    async def undrain(self, host: str, restore: bool, options: DrainOptions) -> Drain | None:
        """Let VMs be placed on `host` again; with `restore` bring back those that its drain moved away.

        Returns the restoration, None without one. Raises `Conflict` while it is drained and when there is
        nothing to undo.
        """
        async with self._lock(host):
            state = self._members.record(host).state
            held = await self._records.drain(host)
            _demand_over(host, held)
            if not restore:
                if state is HostState.ACTIVE:
                    raise Conflict(f"host {host} is not drained; it takes VMs already")
                await self._members.configure(host, {"state": HostState.ACTIVE})
                return None
            if held is None:
                raise Conflict(f"nobody knows of a drain of {host}: there is nothing to bring back")
            vms = await self._to_restore(held.record)
            await self._members.configure(host, {"state": HostState.ACTIVE})
            now_s = self._clock_s()
            drain = await self._survey.plan(host, DrainKind.RESTORE, vms, options, now_s)
            await self._enter(drain, held, HostState.ACTIVE)
        self._work_on(host)
        return drain

    # --- work --------------------------------------------------------------------------------------

    async def advance(self, host: str) -> bool:
        """One look at a drain, and whatever can begin. True when it is over. Raises `StoreError`."""
        async with self._lock(host):
            kept = await self._records.drain(host)
            if kept is None or kept.record.state.over:
                return True
            drain = await self._round.settle(kept.record)
            kept = await self._save(kept, drain)
            while (begun := await self._round.begin_one(kept.record)) is not None:
                kept = await self._save(kept, begun)
            if kept.record.waiting or kept.record.moving:
                return False
            await self._end(kept)
            return True

    async def _end(self, kept: Kept[Drain]) -> None:
        drain = kept.record
        if drain.state is DrainState.CANCELLING:
            state, host_state = DrainState.CANCELLED, HostState.ACTIVE
        else:
            whole = not any(step.state in (StepState.FAILED, StepState.BLOCKED) for step in drain.steps)
            state = DrainState.DONE if whole else DrainState.INCOMPLETE
            host_state = HostState.MAINTENANCE
        if drain.kind is DrainKind.RESTORE:
            host_state = HostState.ACTIVE
        ended = drain.model_copy(update={"state": state, "ended_at_s": self._clock_s()})
        await self._enter(ended, kept, host_state)
        log.info("the %s of %s is over: %s", drain.kind, drain.host, state)

    def _work_on(self, host: str) -> None:
        task = self._tasks.get(host)
        self._news.setdefault(host, asyncio.Event()).set()
        if task is None or task.done():
            self._tasks[host] = asyncio.create_task(self._work(host), name=f"drain {host}")

    async def _work(self, host: str) -> None:
        news = self._news.setdefault(host, asyncio.Event())
        while True:
            news.clear()
            try:
                if await self.advance(host):
                    return
            except TranshumeError as error:
                log.warning("the drain of %s could not be taken further: %s", host, error.message)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._limits.sweep_interval_s):
                    await news.wait()

    async def _watch(self) -> None:
        async for event in self._events.follow(self._events.last_id):
            if event.migration.outcome is not Outcome.RUNNING:
                self.wake()

    # --- records -----------------------------------------------------------------------------------

    async def _owned(self, host: str) -> dict[str, str]:
        """The VMs to go: those that the host owns, and those that still need it as their source."""
        owned = [kept for kept in await self._records.ownerships() if kept.record.owner == host]
        vms = {kept.key.split("/", 1)[1]: host for kept in owned}
        for record in self._migrations.under_way():
            if record.source == host:
                vms[record.vm] = host
        return vms

    async def _to_restore(self, drain: Drain) -> dict[str, str]:
        """The VMs that a drain moved, or that an earlier restoration did not bring back, with where each
        is.
        """
        back = drain.kind is DrainKind.RESTORE
        names = {step.vm for step in drain.steps if (step.state is StepState.MOVED) is not back}
        owners = {kept.key.split("/", 1)[1]: kept.record.owner for kept in await self._records.ownerships()}
        return {vm: owners[vm] for vm in sorted(names) if vm in owners and owners[vm] != drain.host}

    async def _demand_another(self, host: str, vms: Mapping[str, str]) -> None:
        others = [each for each in await self._members.hosts() if each.name != host]
        if not vms or any(not each.silent and each.state is HostState.ACTIVE for each in others):
            return
        told = [f"{each.name} {'is silent' if each.silent else 'is ' + each.state}" for each in others]
        raise Conflict(
            f"host {host} is the last one that may have VMs ({', '.join(told) or 'the farm has no other'}): "
            "undrain or join another first"
        )

    def _goes_on(self, drain: Drain) -> bool:
        """Whether the VMs that an earlier drain moved are still the host's to come back to."""
        undone = self._members.record(drain.host).state is HostState.ACTIVE
        return drain.kind is DrainKind.DRAIN and (drain.state is DrainState.CANCELLED or not undone)

    async def _kept(self, host: str) -> Kept[Drain]:
        self._members.record(host)
        kept = await self._records.drain(host)
        if kept is None:
            raise NotFound(f"host {host} was never drained; `transhume drain {host}` plans it")
        return kept

    async def _switch(self, host: str, before: DrainState, after: DrainState) -> Drain:
        async with self._lock(host):
            kept = await self._kept(host)
            if kept.record.state is not before:
                raise Conflict(f"the {kept.record.kind} of {host} is {kept.record.state}, not {before}")
            await self._save(kept, kept.record.model_copy(update={"state": after}))
        self._work_on(host)
        return await self.show(host)

    async def _save(self, kept: Kept[Drain], drain: Drain) -> Kept[Drain]:
        if drain == kept.record:
            return kept
        revision = await self._records.store.transact(
            compares=[kept.unchanged], puts={kept.key: encode(drain)}
        )
        if revision is None:
            raise StoreError(f"the drain of {drain.host} was changed by another controller")
        return Kept(kept.key, drain, revision)

    async def _enter(self, drain: Drain, held: Kept[Drain] | None, state: HostState) -> None:
        """The record and the host's state at once."""
        done = await self._members.configure(
            drain.host,
            {"state": state},
            {drain_key(drain.host): (held.mod_revision if held else 0, encode(drain))},
        )
        if done is None:
            raise Conflict(
                f"somebody else changed the drain of {drain.host} at this moment; look at it again"
            )

    async def _with_progress(self, step: DrainStep) -> DrainStep:
        if step.state is not StepState.MOVING:
            return step.model_copy(update={"progress": 1.0 if step.state is StepState.MOVED else 0.0})
        record = await self._migrations.get(step.migration)
        if record.progress is None:
            return step
        return step.model_copy(update={"progress": record.progress.fraction})

    def _lock(self, host: str) -> asyncio.Lock:
        return self._locks.setdefault(host, asyncio.Lock())


def _remembering(drain: Drain, earlier: Drain) -> Drain:
    """The record with the VMs that an earlier drain of the host has moved, for whoever brings them back."""
    names = {step.vm for step in drain.steps}
    moved = [step for step in earlier.steps if step.state is StepState.MOVED and step.vm not in names]
    return drain.model_copy(update={"steps": (*moved, *drain.steps)})


def _demand_over(host: str, held: Kept[Drain] | None) -> None:
    if held is not None and not held.record.state.over:
        kind = "drained" if held.record.kind is DrainKind.DRAIN else "given its VMs back"
        raise Conflict(
            f"host {host} is being {kind} ({held.record.state}); `transhume drain {host} cancel` ends that"
        )
