"""One look at a drain: what came of the VMs under way, and which ones begin now.

Every look begins with the record in the store and ends with it there, so that it may be the first of a
controller that has just been started. A migration is entered by itself before the drain's record names it;
one that a drain finds under way is taken for its own.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from transhume.farm.admission import Admission, Situation
from transhume.farm.drain_plan import has_slot, next_steps
from transhume.farm.drain_record import (
    MAX_ATTEMPTS,
    Drain,
    DrainKind,
    DrainState,
    DrainStep,
    StepKind,
    StepState,
)
from transhume.farm.members import Members
from transhume.farm.migrations import Migrations
from transhume.farm.pool import Demand
from transhume.farm.vms import Vms
from transhume.model.errors import Conflict, HostLost, PreflightFailed, StoreError, TranshumeError
from transhume.model.migration import Migration, MigrationOptions, Outcome
from transhume.model.vm import VmState

log = logging.getLogger(__name__)

LEAST_DEADLINE_S = 1.0


class DrainRound:
    """Takes drains further. Raises `StoreError`; the same call may be made again then."""

    def __init__(
        self,
        members: Members,
        vms: Vms,
        migrations: Migrations,
        admission: Admission,
        clock_s: Callable[[], float],
        patience_s: float,
    ) -> None:
        self._members = members
        self._vms = vms
        self._migrations = migrations
        self._admission = admission
        self._clock_s = clock_s
        self._patient_until_s = clock_s() + patience_s

    async def settle(self, drain: Drain) -> Drain:
        """The record with what is known by now of every VM; begins nothing."""
        found = await self._admission.situation()
        steps = [await self._looked_at(drain, step, found) for step in drain.steps]
        steps += self._newcomers(drain, found)
        overdue = self._overdue(drain)
        if drain.state is DrainState.CANCELLING or overdue:
            reason = "the deadline of the drain came first" if overdue else "the drain was cancelled"
            state = StepState.FAILED if overdue else StepState.LEFT
            steps = [
                _ended(step, state, reason) if step.state is StepState.WAITING else step for step in steps
            ]
        return drain.model_copy(update={"steps": tuple(steps)})

    async def begin_one(self, drain: Drain) -> Drain | None:
        """The record with one VM more under way, or known not to go. None: nothing can begin now."""
        if drain.state is not DrainState.RUNNING or self._overdue(drain):
            return None
        busy = Counter((each.source, each.destination) for each in self._migrations.under_way())
        for step in next_steps(drain, busy):
            if self._members.silent(step.source):
                continue
            begun = await self._begun(drain, step, busy)
            if begun != step:
                return with_step(drain, begun)
        return None

    def _overdue(self, drain: Drain) -> bool:
        deadline_s = drain.options.deadline_s
        return deadline_s is not None and self._clock_s() >= drain.created_at_s + deadline_s

    # --- looking -----------------------------------------------------------------------------------

    async def _looked_at(self, drain: Drain, step: DrainStep, found: Situation) -> DrainStep:
        if step.state is StepState.MOVING:
            return self._after(drain, step, await self._migrations.get(step.migration), found)
        if step.state is not StepState.WAITING:
            return step
        if step.vm not in found.vms:
            return _ended(step, StepState.LEFT, "it was deleted")
        owner, migration = found.owners[step.vm].owner, found.vms[step.vm].migration
        if migration and owner == step.source:
            record = await self._migrations.get(migration)
            update = {"state": StepState.MOVING, "migration": migration, "destination": record.destination}
            return step.model_copy(update=update)
        if owner != step.source:
            if drain.kind is DrainKind.RESTORE and owner != drain.host:
                return step.model_copy(update={"source": owner})
            return _ended(step.model_copy(update={"destination": owner}), StepState.MOVED, "")
        stopped = found.states[step.vm] is VmState.STOPPED
        return step.model_copy(update={"kind": StepKind.REHOME if stopped else StepKind.LIVE})

    def _after(self, drain: Drain, step: DrainStep, record: Migration, found: Situation) -> DrainStep:
        """What a VM's migration came to."""
        if record.outcome is Outcome.RUNNING:
            return step
        if record.outcome is Outcome.COMPLETED:
            report = record.report
            update = {
                "wire_bytes": report.wire_bytes,
                "seconds": report.total_ms / 1000,
                "destination": record.destination,
            }
            return _ended(step.model_copy(update=update), StepState.MOVED, record.error)
        owner = found.owners.get(step.vm)
        if record.outcome is Outcome.CANCELLED:
            if drain.state is DrainState.CANCELLING:
                return _ended(step, StepState.LEFT, "the drain was cancelled")
            return _ended(step, StepState.FAILED, f"its migration {record.id} was cancelled")
        if owner is None or owner.owner != step.source:
            return _ended(step, StepState.FAILED, record.error)
        return _failed(step, record.error)

    def _newcomers(self, drain: Drain, found: Situation) -> list[DrainStep]:
        """VMs that have come to the host since the drain was planned: they were on their way there."""
        if drain.kind is DrainKind.RESTORE or drain.state is DrainState.CANCELLING:
            return []
        known = {step.vm for step in drain.steps if step.state is not StepState.MOVED}
        return [
            DrainStep(vm=vm, source=drain.host, memory_bytes=Demand.of(found.vms[vm].spec).memory_bytes)
            for vm, owner in sorted(found.owners.items())
            if owner.owner == drain.host and vm not in known
        ]

    # --- beginning ---------------------------------------------------------------------------------

    async def _begun(self, drain: Drain, step: DrainStep, busy: Counter[tuple[str, str]]) -> DrainStep:
        """The step as it is after one try; unchanged when it has to wait."""
        try:
            vm = await self._vms.show(step.vm)
        except TranshumeError as error:
            return step if isinstance(error, StoreError) else _ended(step, StepState.LEFT, error.message)
        demand = Demand.of(vm.spec)
        host, reasons = await self._chosen(drain, step, demand)
        if not host:
            if self._may_change():
                return step
            state = StepState.LEFT if step.kind is StepKind.REHOME else StepState.FAILED
            return _ended(step, state, "; ".join(reasons))
        going = step.model_copy(update={"destination": host})
        if step.kind is StepKind.REHOME:
            return await self._rehomed(going)
        moving = await self._moving(drain, going) if has_slot(going, drain.options, busy) else None
        if moving is None:
            self._admission.let_go(step.vm, host)
        return moving or step

    async def _moving(self, drain: Drain, step: DrainStep) -> DrainStep | None:
        """The VM on its way, or what came of the try. None: it has to wait."""
        leaving = frozenset(each.vm for each in drain.steps if not each.state.over)
        try:
            migration = await self._migrations.request(
                step.vm, step.destination, self._options(drain), leaving
            )
        except StoreError:
            raise
        except (Conflict, HostLost) as error:
            log.info("VM %s cannot leave %s yet: %s", step.vm, step.source, error.message)
            return None
        except TranshumeError as error:
            self._admission.let_go(step.vm, step.destination)
            reasons = error.reasons if isinstance(error, PreflightFailed) else ()
            return _failed(step, "; ".join(reasons) or error.message)
        return step.model_copy(
            update={"state": StepState.MOVING, "migration": migration.id, "attempts": step.attempts + 1}
        )

    async def _rehomed(self, step: DrainStep) -> DrainStep:
        """A stopped VM changes its owner at once; where it cannot, it stays, and that is no failure."""
        try:
            async with self._vms.locks.of(step.vm):
                await self._vms.lodging.rehoming.rehome(step.vm, step.destination)
        except StoreError:
            raise
        except PreflightFailed as error:
            left = _failed(step, "; ".join(error.reasons))
            return left if left.state is StepState.WAITING else _ended(left, StepState.LEFT, left.reason)
        except TranshumeError as error:
            return _ended(step, StepState.LEFT, error.message)
        finally:
            self._admission.let_go(step.vm, step.destination)
        return _ended(step, StepState.MOVED, "")

    async def _chosen(self, drain: Drain, step: DrainStep, demand: Demand) -> tuple[str, tuple[str, ...]]:
        """The host that was planned if it will do, then another, then one that was tried before."""
        if drain.kind is DrainKind.RESTORE:
            wanted = [[drain.host]]
        else:
            others = [name for name in self._members.names() if name != drain.host]
            fresh = [name for name in others if name not in step.tried]
            planned = [name for name in fresh if name == step.destination]
            wanted = [planned, fresh, others]
        leaving = {each.vm: each.source for each in drain.steps if not each.state.over}
        lawless = drain.options.migration.ignore_rules
        reasons: tuple[str, ...] = ("the farm has no other host",)
        asked = demand if step.kind is StepKind.LIVE else demand.at_rest()
        for candidates in wanted:
            if not candidates:
                continue
            choice = await self._admission.place(asked, candidates, leaving=leaving, ignore_rules=lawless)
            if choice.host:
                return choice.host, ()
            reasons = choice.reasons
        return "", reasons

    def _may_change(self) -> bool:
        """Whether hosts that were not heard from since the controller started may still be."""
        silent = any(self._members.silent(name) for name in self._members.names())
        return silent and self._clock_s() < self._patient_until_s

    def _options(self, drain: Drain) -> MigrationOptions:
        options = drain.options.migration
        if drain.options.deadline_s is None:
            return options
        left_s = drain.created_at_s + drain.options.deadline_s - self._clock_s()
        return options.model_copy(
            update={"deadline_s": max(LEAST_DEADLINE_S, min(options.deadline_s, left_s))}
        )


def with_step(drain: Drain, step: DrainStep) -> Drain:
    """The record with this step in the place of the one of the same VM that was not over."""
    steps = tuple(step if each.vm == step.vm and not each.state.over else each for each in drain.steps)
    return drain.model_copy(update={"steps": steps})


def _failed(step: DrainStep, reason: str) -> DrainStep:
    """Tried once more, elsewhere, or given up."""
    attempts = max(1, step.attempts) if step.state is StepState.MOVING else step.attempts + 1
    tried = (*step.tried, step.destination) if step.destination else step.tried
    again = attempts < MAX_ATTEMPTS
    return step.model_copy(
        update={
            "state": StepState.WAITING if again else StepState.FAILED,
            "attempts": attempts,
            "tried": tried,
            "destination": "" if again else step.destination,
            "migration": "" if again else step.migration,
            "reason": reason,
        }
    )


def _ended(step: DrainStep, state: StepState, reason: str) -> DrainStep:
    return step.model_copy(update={"state": state, "reason": reason})
