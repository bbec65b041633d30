"""What happens in the farm as a stream, and long actions as operations: routes under /v1."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query
from fastapi.responses import StreamingResponse

from transhume.api.beats import with_beats
from transhume.farm.controller import Controller
from transhume.farm.feed import EventPage, FarmEvent
from transhume.farm.operations import Operation

MAX_EVENT_ID = (1 << 63) - 1
MAX_WAIT_S = 60.0

OperationId = Annotated[str, Path(pattern=r"^[a-z0-9-]{1,80}$")]
EventId = Annotated[int, Query(ge=0, le=MAX_EVENT_ID)]


def add_operation_routes(router: APIRouter, controller: Controller) -> None:
    """Add them to the router of /v1."""
    _add_event_routes(router, controller)
    operations = controller.operations

    @router.get("/operations")
    async def list_operations(limit: Annotated[int, Query(ge=1, le=500)] = 100) -> list[Operation]:
        """Migrations and drains, the latest ones, the oldest of those first."""
        return await operations.list(limit)

    @router.get("/operations/{operation}")
    async def show_operation(
        operation: OperationId, wait_s: Annotated[float, Query(ge=0, le=MAX_WAIT_S)] = 0.0
    ) -> Operation:
        """With `wait_s` the answer comes when it is over, at the latest after so long."""
        return await operations.wait(operation, wait_s) if wait_s else await operations.show(operation)

    @router.post("/operations/{operation}/cancel")
    async def cancel_operation(operation: OperationId) -> Operation:
        """Of a drain what has moved stays, and what is under way is left to end."""
        return await operations.cancel(operation)


def _add_event_routes(router: APIRouter, controller: Controller) -> None:
    feed = controller.feed

    @router.get(
        "/events",
        response_class=StreamingResponse,
        responses={200: {"description": "Server-sent events", "content": {"text/event-stream": {}}}},
    )
    async def events(
        after: EventId | None = None,
        last_event_id: Annotated[str | None, Header(pattern=r"^[0-9]{1,18}$")] = None,
    ) -> StreamingResponse:
        """Server-sent events: each has an id, its kind as the event's name, and a `FarmEvent` as data.

        It goes on behind `Last-Event-ID`, or else `after`; without either it begins now, and `after=0` begins
        with the oldest that is held. An event `gap` says that some are not held any more.
        """
        seen = after if last_event_id is None else int(last_event_id)
        return StreamingResponse(_stream(feed.follow(seen)), media_type="text/event-stream")

    @router.get("/events/history")
    async def history(after: EventId = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> EventPage:
        """What is still held: the latest `limit` after this number."""
        return feed.page(after, limit)


async def _stream(events: AsyncIterator[FarmEvent]) -> AsyncIterator[bytes]:
    # At once, so that the other end knows that it is heard before anything happens.
    yield b": transhume events\n\n"
    async with aclosing(with_beats(events)) as beating:
        async for event in beating:
            if event is None:
                yield b": beat\n\n"
            else:
                yield f"id: {event.id}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n".encode()
