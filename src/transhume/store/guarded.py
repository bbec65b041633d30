"""A store through which only the leader writes: each transaction also demands that it still leads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transhume.model.errors import StoreUnavailable
from transhume.store.election import Leadership
from transhume.store.interface import ABSENT, Compare, Store
from transhume.store.reading import ReadsThrough


class GuardedStore(ReadsThrough):
    """Satisfies `Store` on top of `store`, for as long as `leadership` lasts.

    What a leader of the past writes is refused with `StoreUnavailable`, and by the store itself if it was on
    its way already. Closing it leaves `store` open, which others use.
    """

    def __init__(self, store: Store, leadership: Leadership) -> None:
        super().__init__(store)
        self._leadership = leadership

    async def transact(
        self,
        compares: Sequence[Compare] = (),
        puts: Mapping[str, bytes] | None = None,
        deletes: Sequence[str] = (),
    ) -> int | None:
        if not self._leadership.leading:
            raise self._over()
        guard = self._leadership.guard
        revision = await self._store.transact([*compares, guard], puts, deletes)
        if revision is not None:
            return revision
        # Which comparison failed is not told. The record of who leads is never made twice with one revision.
        entry = await self._store.get(guard.key)
        if (ABSENT if entry is None else entry.mod_revision) != guard.mod_revision:
            raise self._over()
        return None

    async def close(self) -> None:
        """Leave it to whoever opened the store."""

    def _over(self) -> StoreUnavailable:
        return StoreUnavailable(
            "the controller has gone to another host at this moment; nothing was written. Ask again"
        )
