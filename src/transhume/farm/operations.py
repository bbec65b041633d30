"""Long actions seen in one way: migrations and drains as operations. Only a view: nothing is kept here.

The id of an operation is that of its migration, or `drain-` and the host's name for the latest drain of a
host (which may be the bringing back of its VMs).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from transhume.farm.drain import Drains
from transhume.farm.drain_record import Drain, DrainKind, DrainState, StepState
from transhume.farm.feed import Feed
from transhume.farm.migrations import Migrations
from transhume.farm.records import FarmRecords
from transhume.model.errors import Conflict, NotFound
from transhume.model.migration import Migration, Outcome, Phase

DRAIN_PREFIX = "drain-"


class OperationKind(StrEnum):
    """Which action it is."""

    MIGRATION = "migration"
    DRAIN = "drain"
    RESTORE = "restore"


class OperationState(StrEnum):
    """How far it is. Those from `DONE` on are over; `FAILED` is also a drain that left VMs behind."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        return self in (OperationState.DONE, OperationState.FAILED, OperationState.CANCELLED)


class Operation(BaseModel):
    """One long action. `progress` goes from 0 to 1; `text` says how far it is, for a person.

    `host` is where the VM was, or the host that is drained. `error` and `error_code` say why it failed. The
    whole record is in `migration` or in `drain`: with it comes the result.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    kind: OperationKind
    state: OperationState
    text: str
    vm: str = ""
    host: str = ""
    progress: float = 0.0
    created_at_s: float = 0.0
    error: str = ""
    error_code: str = ""
    migration: Migration | None = None
    drain: Drain | None = None


_OUTCOMES = {
    Outcome.RUNNING: OperationState.RUNNING,
    Outcome.COMPLETED: OperationState.DONE,
    Outcome.FAILED: OperationState.FAILED,
    Outcome.CANCELLED: OperationState.CANCELLED,
}
_DRAIN_STATES = {
    DrainState.RUNNING: OperationState.RUNNING,
    DrainState.PAUSED: OperationState.PAUSED,
    DrainState.CANCELLING: OperationState.CANCELLING,
    DrainState.DONE: OperationState.DONE,
    DrainState.INCOMPLETE: OperationState.FAILED,
    DrainState.CANCELLED: OperationState.CANCELLED,
}


def of_migration(record: Migration) -> Operation:
    """A migration as an operation."""
    state = OperationState.WAITING if record.phase is Phase.QUEUED else _OUTCOMES[record.outcome]
    if record.outcome is not Outcome.RUNNING:
        state = _OUTCOMES[record.outcome]
    done = 1.0 if state is OperationState.DONE else record.progress.fraction if record.progress else 0.0
    to = f" to {record.destination}" if record.destination else ""
    return Operation(
        id=record.id,
        kind=OperationKind.MIGRATION,
        state=state,
        text=f"VM {record.vm} from {record.source}{to}: {record.phase}",
        vm=record.vm,
        host=record.source,
        progress=done,
        created_at_s=record.created_at_s,
        error=record.error,
        error_code=record.error_code,
        migration=record,
    )


def of_drain(drain: Drain) -> Operation:
    """A drain as an operation. It has gone as far as its VMs, each counted by its memory."""
    shares = [(max(1, step.memory_bytes), 1.0 if step.state.over else step.progress) for step in drain.steps]
    whole = sum(weight for weight, _ in shares)
    part = sum(weight * done for weight, done in shares)
    stuck = [
        f"{step.vm}: {step.reason}"
        for step in drain.steps
        if step.state in (StepState.FAILED, StepState.BLOCKED)
    ]
    over = sum(step.state.over for step in drain.steps)
    failed = drain.state is DrainState.INCOMPLETE
    return Operation(
        id=f"{DRAIN_PREFIX}{drain.host}",
        kind=OperationKind.DRAIN if drain.kind is DrainKind.DRAIN else OperationKind.RESTORE,
        state=_DRAIN_STATES[drain.state],
        text=f"{drain.kind} of {drain.host}: {over} of {len(drain.steps)} VMs are settled",
        host=drain.host,
        progress=1.0 if drain.state.over or not whole else part / whole,
        created_at_s=drain.created_at_s,
        error="; ".join(stuck) if failed else "",
        error_code="incomplete" if failed else "",
        drain=drain,
    )


class Operations:
    """The verbs of `transhume operation`."""

    def __init__(self, records: FarmRecords, migrations: Migrations, drains: Drains, feed: Feed) -> None:
        self._records = records
        self._migrations = migrations
        self._drains = drains
        self._feed = feed

    async def list(self, limit: int) -> list[Operation]:
        """The latest `limit` of them, the oldest of those first."""
        found = [of_migration(record) for record in await self._migrations.list(limit)]
        found += [
            of_drain(await self._drains.show(kept.record.host)) for kept in await self._records.drains()
        ]
        return sorted(found, key=lambda operation: (operation.created_at_s, operation.id))[-limit:]

    async def show(self, identity: str) -> Operation:
        """One operation with its progress, and its result once it is over. Raises `NotFound`."""
        host = identity.removeprefix(DRAIN_PREFIX)
        try:
            if host != identity:
                return of_drain(await self._drains.show(host))
            return of_migration(await self._migrations.get(identity))
        except NotFound as error:
            raise NotFound(f"there is no operation {identity}; `transhume operations` lists them") from error

    async def cancel(self, identity: str) -> Operation:
        """Give it up as far as that goes, and say how it is then: of a drain what has moved stays.

        Raises `NotFound`, and `Conflict` when it is over, or is a migration past its commit.
        """
        found = await self.show(identity)
        if found.state.over:
            raise Conflict(f"operation {identity} is over: {found.state}")
        if found.drain is not None:
            return of_drain(await self._drains.cancel(found.host, now=False))
        reply = await self._migrations.cancel(identity)
        if not reply.accepted:
            raise Conflict(f"operation {identity} cannot be given up: the VM runs at {reply.runs_at}")
        return await self.show(identity)

    async def wait(self, identity: str, timeout_s: float) -> Operation:
        """The operation when it is over, or as it is after `timeout_s`. Raises `NotFound`."""
        seen = self._feed.last_id
        found = await self.show(identity)
        if found.state.over:
            return found
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                async for _ in self._feed.follow(seen):
                    found = await self.show(identity)
                    if found.state.over:
                        break
        return found
