"""A store in memory for the simulator and for tests: the same contract, nothing durable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transhume.model.errors import StoreError
from transhume.store.interface import ABSENT, Compare, Entry, Snapshot, check_limits


class MemoryStore:
    """Satisfies `Store`. Nothing in it waits, so a transaction is one step of the event loop."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._revision = 0
        self._closed = False

    async def get(self, key: str) -> Entry | None:
        self._demand_open()
        return self._entries.get(key)

    async def list(self, prefix: str) -> Sequence[Entry]:
        self._demand_open()
        found = (entry for key, entry in self._entries.items() if key.startswith(prefix))
        return sorted(found, key=lambda entry: entry.key.encode())

    async def snapshot(self, prefix: str, *, may_be_stale: bool = False) -> Snapshot:
        return Snapshot(await self.list(prefix), self._revision)

    async def transact(
        self,
        compares: Sequence[Compare] = (),
        puts: Mapping[str, bytes] | None = None,
        deletes: Sequence[str] = (),
    ) -> int | None:
        self._demand_open()
        puts = puts or {}
        check_limits(compares, puts, deletes)
        for compare in compares:
            entry = self._entries.get(compare.key)
            if (entry.mod_revision if entry else ABSENT) != compare.mod_revision:
                return None
        self._revision += 1
        for key, value in puts.items():
            self._entries[key] = Entry(key, bytes(value), self._revision)
        for key in deletes:
            self._entries.pop(key, None)
        return self._revision

    async def close(self) -> None:
        self._closed = True

    def _demand_open(self) -> None:
        if self._closed:
            raise StoreError("the farm's store is closed; start the daemon again")
