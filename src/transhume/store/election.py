"""Which of several controllers acts: one leader for each name, and it is told when it no longer leads.

A leader can never be certain that it still leads while its change is on the way: it may stand still for a
minute between looking and writing. So whoever acts as a leader adds `Leadership.guard` to the comparisons of
its transactions. The store then refuses what comes from a leader of the past.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from transhume.model.errors import Refused, StoreError
from transhume.store.interface import Compare, Store

MIN_TTL_S = 2.0
"""etcd makes every shorter lease as long as this, with its default election limits."""

ELECTIONS = "elections/"
"""Under this prefix each name's record holds its leader's candidate, as long as it leads."""


class Leadership(Protocol):
    """What a candidate holds after it was elected. Also when it is lost, `resign` must be called."""

    @property
    def name(self) -> str:
        """Of the election."""
        ...

    @property
    def guard(self) -> Compare:
        """Holds as long as this leadership does: for the comparisons of what a leader writes."""
        ...

    @property
    def leading(self) -> bool:
        """False from the moment when somebody else may lead, whether or not the store can be asked."""
        ...

    async def lost(self) -> str:
        """Wait until the leadership is over, and return why, in words."""
        ...

    async def resign(self) -> None:
        """Let the next candidate lead at once, if the store can be asked. May be called again."""
        ...


class Election(Protocol):
    """One candidate's way to leadership. Several names may be campaigned for at once."""

    async def campaign(self, name: str, ttl_s: float) -> Leadership:
        """Wait until this candidate leads `name`, also while the store cannot be asked.

        A leader that dies is followed within `ttl_s` and about a second, or twice `ttl_s` if the store's own
        leader dies with it. Cancelling ends the campaign. Raises `Refused` for a `ttl_s` under `MIN_TTL_S`.
        """
        ...

    async def leader(self, name: str) -> str | None:
        """The candidate that leads `name` now, or None. Raises `StoreError`."""
        ...


class Ending:
    """That something is over, and why. The first reason stays."""

    def __init__(self) -> None:
        self._over = asyncio.Event()
        self._reason = ""

    def __bool__(self) -> bool:
        return self._over.is_set()

    def end(self, reason: str) -> None:
        """Say that it is over."""
        if not self._over.is_set():
            self._reason = reason
            self._over.set()

    async def wait(self) -> str:
        """Wait for it and return the reason."""
        await self._over.wait()
        return self._reason


class LocalElection:
    """Satisfies `Election` for a store that only this process has open: nobody else can lead.

    Several campaigns for one name in this process still follow each other.
    """

    def __init__(self, store: Store, candidate: str) -> None:
        self._store = store
        self._candidate = candidate
        self._turns: dict[str, asyncio.Lock] = {}

    async def campaign(self, name: str, ttl_s: float) -> Leadership:
        check_ttl(ttl_s)
        turn = self._turns.setdefault(name, asyncio.Lock())
        await turn.acquire()
        try:
            # A record that a process before this one has left behind is overwritten.
            revision = await self._store.transact(puts={ELECTIONS + name: self._candidate.encode()})
        except BaseException:
            turn.release()
            raise
        assert revision is not None
        return _LocalLeadership(self._store, name, Compare(ELECTIONS + name, revision), turn)

    async def leader(self, name: str) -> str | None:
        turn = self._turns.get(name)
        if turn is None or not turn.locked():
            return None
        entry = await self._store.get(ELECTIONS + name)
        return None if entry is None else entry.value.decode()


class _LocalLeadership:
    def __init__(self, store: Store, name: str, guard: Compare, turn: asyncio.Lock) -> None:
        self._store = store
        self._turn = turn
        self._ending = Ending()
        self.name = name
        self.guard = guard

    @property
    def leading(self) -> bool:
        return not self._ending

    async def lost(self) -> str:
        return await self._ending.wait()

    async def resign(self) -> None:
        if self._ending:
            return
        self._ending.end(f"this host has given up to lead {self.name}")
        try:
            # Without the store the record stays; the next campaign writes over it.
            with contextlib.suppress(StoreError):
                await self._store.transact(compares=[self.guard], deletes=[self.guard.key])
        finally:
            self._turn.release()


def check_ttl(ttl_s: float) -> None:
    """Raise `Refused` for a time to live that not every store can keep."""
    if not ttl_s >= MIN_TTL_S:
        raise Refused(f"a leader's time to live of {ttl_s:g} s is too short; {MIN_TTL_S:g} s is the least")
