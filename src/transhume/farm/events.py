"""What happens to migrations, as a stream that many can follow and nobody can slow down.

The log is one ring of the last events. A follower holds no queue, only the number of the last event that
it has seen: a slow one costs nothing, and one that lost its connection goes on where it was. Every event
is a whole record, so that whoever missed some needs only the latest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from pydantic import BaseModel, ConfigDict

from transhume.model.migration import Migration

RING_EVENTS = 1024


class MigrationEvent(BaseModel):
    """One change of one migration. `id` rises over the whole farm, also across restarts of the controller."""

    model_config = ConfigDict(frozen=True)

    id: int
    migration: Migration


class EventLog:
    """The ring. Used from one event loop only."""

    def __init__(self, first_id: int) -> None:
        self._events: deque[MigrationEvent] = deque(maxlen=RING_EVENTS)
        self._next_id = first_id
        self._news = asyncio.Event()
        self._closed = False

    @property
    def last_id(self) -> int:
        """The number of the latest event, or one less than the first that will be given."""
        return self._next_id - 1

    def append(self, migration: Migration) -> None:
        self._events.append(MigrationEvent(id=self._next_id, migration=migration))
        self._next_id += 1
        self._wake()

    def close(self) -> None:
        """End all streams, after what was appended."""
        self._closed = True
        self._wake()

    async def follow(self, after: int, migration: str | None = None) -> AsyncIterator[MigrationEvent]:
        """Events with a number over `after`, of one migration or of all, until the log closes.

        Events that have left the ring are left out.
        """
        while True:
            news = self._news
            pending = [event for event in self._events if event.id > after]
            for event in pending:
                after = event.id
                if migration is None or event.migration.id == migration:
                    yield event
            if self._closed:
                return
            if not pending:
                await news.wait()

    def _wake(self) -> None:
        # Each wake-up has an Event of its own, so that one cannot be missed between looking and waiting.
        self._news.set()
        self._news = asyncio.Event()
