"""The farm's events and long actions, seen from a program: `FarmClient.feed`, `FarmClient.operations`."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from pydantic import TypeAdapter, ValidationError

from transhume.api.http_calls import HttpCalls, part
from transhume.api.http_stream import open_answer
from transhume.api.problem import from_problem
from transhume.farm.feed import EventPage, FarmEvent
from transhume.farm.operations import Operation
from transhume.model.errors import HostLost, PeerProtocolError, TimedOut

_OPERATIONS: TypeAdapter[list[Operation]] = TypeAdapter(list[Operation])

STREAM_SILENCE_S = 20.0
WAIT_S = 20.0
"""A wait is asked for in pieces, so that a controller that is lost meanwhile is noticed."""


class FeedClient:
    """The farm's events. Raises the errors of `transhume.model.errors`."""

    def __init__(self, calls: HttpCalls) -> None:
        self._calls = calls

    async def history(self, after: int = 0, limit: int = 100) -> EventPage:
        """The latest `limit` events after this number that are still held."""
        params = {"after": after, "limit": limit}
        return await self._calls.ask("GET", "/v1/events/history", EventPage, params=params)

    async def follow(self, after: int | None = None) -> AsyncGenerator[FarmEvent]:
        """Events as they happen, after this number or from now on, without an end.

        `HostLost` when the stream breaks: go on with the number of the last event. One of kind `gap` says
        that some are not held any more.
        """
        path = "/v1/events" if after is None else f"/v1/events?after={after}"
        calls = self._calls
        async with open_answer(
            calls.peer, calls.target, calls.tls, "GET", path, None, STREAM_SILENCE_S
        ) as answer:
            if answer.head.status >= 400:
                body = b"".join([piece async for piece in answer.body])
                raise from_problem(answer.head.status, body, calls.peer)
            rest = b""
            async for piece in answer.body:
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: "):
                        yield _event(line.removeprefix(b"data: "), calls.peer)
        raise HostLost(f"{calls.peer} ended the stream of events")


class OperationsClient:
    """Migrations and drains as operations. Raises the errors of `transhume.model.errors`."""

    def __init__(self, calls: HttpCalls) -> None:
        self._calls = calls

    async def list(self, limit: int = 100) -> list[Operation]:
        """The latest ones, the oldest of those first."""
        return await self._calls.ask("GET", "/v1/operations", _OPERATIONS, params={"limit": limit})

    async def show(self, operation: str) -> Operation:
        """Its state and progress, and its result once it is over."""
        return await self._calls.ask("GET", f"/v1/operations/{part(operation)}", Operation)

    async def cancel(self, operation: str) -> Operation:
        """Give it up. Raises `Conflict` when it is over or too late."""
        path = f"/v1/operations/{part(operation)}/cancel"
        return await self._calls.ask("POST", path, Operation, timeout_s=60.0)

    async def wait(self, operation: str, timeout_s: float | None = None) -> Operation:
        """The operation when it is over. `TimedOut` after `timeout_s` (None: wait for ever); it goes on."""
        left_s = timeout_s
        path = f"/v1/operations/{part(operation)}"
        while True:
            wait_s = WAIT_S if left_s is None else min(WAIT_S, max(0.0, left_s))
            params = {"wait_s": wait_s}
            found = await self._calls.ask("GET", path, Operation, params=params, timeout_s=wait_s + 30)
            if found.state.over:
                return found
            if left_s is not None:
                left_s -= wait_s
                if left_s <= 0:
                    raise TimedOut(
                        f"operation {operation} is not over after {timeout_s:g} s; it goes on, and "
                        f"`transhume operation {operation} wait` waits for it"
                    )


def _event(line: bytes, peer: str) -> FarmEvent:
    try:
        return FarmEvent.model_validate_json(line)
    except ValidationError as error:
        raise PeerProtocolError(
            f"{peer} sent an event that cannot be read; is it of another release?"
        ) from error
