"""Where the feed's news come from: the records as they are written, what hosts say, and migrations' phases.

`TellingStore` stands before the real store, so that every change of a record is told whoever makes it, and
nothing else in the farm has to remember to. What another controller writes does not come by here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from transhume.farm.events import EventLog
from transhume.farm.feed import Feed, Kind, News
from transhume.farm.members import Members
from transhume.farm.record_news import RecordNews
from transhume.host.steady import again
from transhume.model.migration import Migration, Outcome, Phase
from transhume.model.vm import VmState
from transhume.store.interface import Compare, Store
from transhume.store.reading import ReadsThrough

LOOK_INTERVAL_S = 1.0

OnWritten = Callable[[str, bytes | None], None]


class TellingStore(ReadsThrough):
    """Satisfies `Store`: the same store, and `told` hears of each record that was written or deleted."""

    def __init__(self, store: Store, told: OnWritten) -> None:
        super().__init__(store)
        self._told = told

    async def transact(
        self,
        compares: Sequence[Compare] = (),
        puts: Mapping[str, bytes] | None = None,
        deletes: Sequence[str] = (),
    ) -> int | None:
        revision = await self._store.transact(compares, puts, deletes)
        if revision is not None:
            for key, value in (puts or {}).items():
                self._told(key, value)
            for key in deletes:
                self._told(key, None)
        return revision

    async def close(self) -> None:
        await self._store.close()


class Watcher:
    """Fills the feed. Make it first, then the members over its `store`; then `watch`, and `close` at the
    end.
    """

    def __init__(self, store: Store, feed: Feed) -> None:
        self.store: Store = TellingStore(store, self._written)
        self._feed = feed
        self._records = RecordNews()
        self._quiet = True
        self._phases: dict[str, Phase] = {}
        self._silent: dict[str, bool] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def watch(self, members: Members, events: EventLog) -> None:
        """Learn how the farm is, silently, and tell what happens from now on. Raises `StoreError`."""
        for prefix in ("vms/", "ownership/", "hosts/", "drains/", "rules/"):
            for entry in await self.store.list(prefix):
                self._records.written(entry.key, entry.value)
        self._quiet = False
        members.on_states = self._states
        self._silent = {name: members.silent(name) for name in members.names()}
        self._tasks = [
            asyncio.create_task(self._follow(events, events.last_id), name="news of migrations"),
            asyncio.create_task(
                again("tell the news of hosts", LOOK_INTERVAL_S, partial(self._look, members), at_once=False),
                name="news of hosts",
            ),
        ]

    async def close(self) -> None:
        """Stop, and end all streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._feed.close()

    def _written(self, key: str, value: bytes | None) -> None:
        for news in self._records.written(key, value):
            if not self._quiet:
                self._feed.tell(news)

    def _states(self, host: str, before: Mapping[str, VmState], after: Mapping[str, VmState]) -> None:
        """What a host says of its own VMs. While a VM moves, two hosts have it: its owner's word counts."""
        for vm in before.keys() | after.keys():
            old, new = before.get(vm, VmState.STOPPED), after.get(vm, VmState.STOPPED)
            if old is not new and self._records.owner(vm) == host:
                self._feed.tell(
                    News(
                        kind=Kind.VM_STATE,
                        vm=vm,
                        host=host,
                        text=f"VM {vm} at {host} is {new.value}, was {old.value}",
                        data={"state": new.value, "before": old.value},
                    )
                )

    async def _follow(self, events: EventLog, after: int) -> None:
        async for event in events.follow(after):
            news = self._news_of(event.migration)
            if news is not None:
                self._feed.tell(news)

    def _news_of(self, record: Migration) -> News | None:
        """A phase that is new, or the end; progress within a phase is told by the migration's own stream."""
        if record.outcome is not Outcome.RUNNING:
            self._phases.pop(record.id, None)
            kind = Kind.MIGRATION_ENDED
            text = f"migration {record.id} of VM {record.vm}: {record.outcome}; it runs at: {record.runs_at}"
        elif self._phases.get(record.id) is record.phase:
            return None
        else:
            self._phases[record.id] = record.phase
            kind = Kind.MIGRATION_PHASE
            to = f" to {record.destination}" if record.destination else ""
            text = f"migration {record.id} of VM {record.vm} from {record.source}{to}: {record.phase}"
        return News(
            kind=kind,
            vm=record.vm,
            host=record.source,
            migration=record.id,
            text=text,
            data={
                "phase": record.phase.value,
                "outcome": record.outcome.value,
                "source": record.source,
                "destination": record.destination,
                "error": record.error,
                "error_code": record.error_code,
            },
        )

    async def _look(self, members: Members) -> None:
        self.look(members)

    def look(self, members: Members) -> None:
        """Tell which hosts were lost or came back since the last look."""
        now = {name: members.silent(name) for name in members.names()}
        for name, silent in now.items():
            if silent != self._silent.get(name, False):
                kind = Kind.HOST_LOST if silent else Kind.HOST_BACK
                text = f"host {name} is silent" if silent else f"host {name} answers again"
                self._feed.tell(News(kind=kind, host=name, text=text))
        self._silent = now
