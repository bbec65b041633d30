"""Everything that happens in the farm, as one numbered stream that many can follow and nobody can slow down.

It is kept as `farm.events.EventLog` keeps migrations: a ring of the last events, and followers that hold
only the number that they have seen. It lives in the memory of the controller that answers. A follower whose
number has left the ring, or is of before that controller's start, is told so by an event of kind `gap` and
has to look at the farm anew.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, JsonValue

RING_EVENTS = 4096


class Kind(StrEnum):
    """What happened. More may be added: a program leaves alone what it does not know."""

    VM_CREATED = "vm-created"
    VM_CHANGED = "vm-changed"
    VM_STATE = "vm-state"
    VM_MOVED = "vm-moved"
    VM_DELETED = "vm-deleted"
    HOST_JOINED = "host-joined"
    HOST_CHANGED = "host-changed"
    HOST_LOST = "host-lost"
    HOST_BACK = "host-back"
    HOST_REMOVED = "host-removed"
    MIGRATION_PHASE = "migration-phase"
    MIGRATION_ENDED = "migration-ended"
    DRAIN_BEGUN = "drain-begun"
    DRAIN_STATE = "drain-state"
    DRAIN_STEP = "drain-step"
    RULE_ADDED = "rule-added"
    RULE_REMOVED = "rule-removed"
    FARM_CHANGED = "farm-changed"
    GAP = "gap"


class News(BaseModel):
    """One thing that happened. `text` is a sentence for a person, `data` what a program wants besides.

    `vm`, `host` and `migration` name what it concerns, empty where it concerns none.
    """

    model_config = ConfigDict(frozen=True)

    kind: Kind
    text: str
    vm: str = ""
    host: str = ""
    migration: str = ""
    data: dict[str, JsonValue] = {}


class FarmEvent(News):
    """News with its number, which rises over the whole farm, also across restarts of the controller, and its
    time (seconds since 1970).
    """

    id: int
    at_s: float


class EventPage(BaseModel):
    """Events that are still held. `gap`: some after the number that was asked for are not."""

    model_config = ConfigDict(frozen=True)

    events: tuple[FarmEvent, ...]
    oldest_id: int
    last_id: int
    gap: bool


class Feed:
    """The ring. Used from one event loop only."""

    def __init__(self, first_id: int, clock_s: Callable[[], float], size: int = RING_EVENTS) -> None:
        self._events: deque[FarmEvent] = deque(maxlen=size)
        self._clock_s = clock_s
        self._next_id = first_id
        self._news = asyncio.Event()
        self._closed = False

    @property
    def last_id(self) -> int:
        """The number of the latest event, or one less than the first that will be given."""
        return self._next_id - 1

    @property
    def oldest_id(self) -> int:
        """The number of the oldest event that is held, or of the next one."""
        return self._next_id - len(self._events)

    def tell(self, news: News) -> None:
        """Give news a number and wake whoever follows."""
        self._events.append(FarmEvent(**dict(news), id=self._next_id, at_s=self._clock_s()))
        self._next_id += 1
        self._wake()

    def close(self) -> None:
        """End all streams, after what was told."""
        self._closed = True
        self._wake()

    def lacks(self, after: int) -> bool:
        """Whether events after this number are not held, or the number was never given. 0 asks for what there
        is.
        """
        return after != 0 and not self.oldest_id - 1 <= after <= self.last_id

    def page(self, after: int, limit: int) -> EventPage:
        """The latest `limit` of those after this number; after a number that was never given: of all."""
        begin = 0 if self.lacks(after) else after
        found = [event for event in self._events if event.id > begin]
        return EventPage(
            events=tuple(found[-limit:]),
            oldest_id=self.oldest_id,
            last_id=self.last_id,
            gap=self.lacks(after) or len(found) > limit,
        )

    async def follow(self, after: int | None = None) -> AsyncGenerator[FarmEvent]:
        """Events with a number over `after` (None: only what happens from now on), until the feed closes.

        Where some are missing, first or on the way, a `gap` with the number before the oldest one held.
        """
        seen = self.last_id if after is None else after
        while True:
            news = self._news
            if self.lacks(seen):
                yield self._gap(seen)
                seen = self.oldest_id - 1
            pending = [event for event in self._events if event.id > seen]
            for event in pending:
                if event.id < self.oldest_id:
                    break  # the follower was slower than the ring: begin anew with a gap
                seen = event.id
                yield event
            if self._closed:
                return
            if not pending:
                await news.wait()

    def _gap(self, after: int) -> FarmEvent:
        return FarmEvent(
            id=self.oldest_id - 1,
            at_s=self._clock_s(),
            kind=Kind.GAP,
            text=f"what happened between event {after} and event {self.oldest_id} is not held any more: "
            "look at the farm anew",
            data={"after": after, "oldest_id": self.oldest_id},
        )

    def _wake(self) -> None:
        # Each wake-up has an Event of its own, so that one cannot be missed between looking and waiting.
        self._news.set()
        self._news = asyncio.Event()
