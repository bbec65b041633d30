"""What stands before another store and reads from it unchanged."""

from __future__ import annotations

from collections.abc import Sequence

from transhume.store.interface import Entry, Snapshot, Store


class ReadsThrough:
    """The reading half of `Store`, on top of `store`. What is done when it is written to, subclasses say."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, key: str) -> Entry | None:
        return await self._store.get(key)

    async def list(self, prefix: str) -> Sequence[Entry]:
        return await self._store.list(prefix)

    async def snapshot(self, prefix: str, *, may_be_stale: bool = False) -> Snapshot:
        return await self._store.snapshot(prefix, may_be_stale=may_be_stale)
