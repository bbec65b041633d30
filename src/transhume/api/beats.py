"""A stream of events that says in between that it is still alive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

Event = TypeVar("Event")

STREAM_BEAT_S = 5.0
"""A stream without news says something so often, so that both ends notice when the other is gone."""


async def with_beats(events: AsyncIterator[Event]) -> AsyncGenerator[Event | None, None]:
    """The events, and None whenever none has come for `STREAM_BEAT_S`. Closing it ends the waiting."""
    upcoming: asyncio.Task[Event] | None = None
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(_next(events))
            done, _ = await asyncio.wait({upcoming}, timeout=STREAM_BEAT_S)
            if not done:
                yield None
                continue
            try:
                event = upcoming.result()
            except StopAsyncIteration:
                return
            upcoming = None
            yield event
    finally:
        if upcoming is not None:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)
