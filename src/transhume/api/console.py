"""A guest's serial console over a WebSocket: binary frames are the console, a text frame is a problem.

The same on each leg: CLI to its daemon, member to controller, controller to owner.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from transhume.api.problem import encode_problem
from transhume.model.errors import TranshumeError

Join = Callable[[AsyncIterator[bytes]], AsyncIterator[bytes] | Awaitable[AsyncIterator[bytes]]]
"""Joins a console: takes what is typed, gives what the guest prints."""

CLOSE_NORMAL = 1000
CLOSE_PROBLEM = 1011


async def serve_console(websocket: WebSocket, join: Join) -> None:
    """Connect a WebSocket with a console until either side ends."""
    await websocket.accept()
    typed: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=64)
    listening = asyncio.create_task(_listen(websocket, typed), name="console input")
    printing = asyncio.create_task(_print(websocket, join, _drain(typed)), name="console output")
    try:
        await asyncio.wait({listening, printing}, return_when=asyncio.FIRST_COMPLETED)
        if not printing.done():
            # The person has gone: the console gets no more input, and nobody reads its output.
            printing.cancel()
        await asyncio.gather(printing, return_exceptions=True)
        if not printing.cancelled() and (error := printing.exception()) is not None:
            await _tell(websocket, error)
        elif websocket.application_state is WebSocketState.CONNECTED and not listening.done():
            await websocket.close(CLOSE_NORMAL)
    finally:
        listening.cancel()
        printing.cancel()
        await asyncio.gather(listening, printing, return_exceptions=True)


async def _listen(websocket: WebSocket, typed: asyncio.Queue[bytes | None]) -> None:
    try:
        while True:
            await typed.put(await websocket.receive_bytes())
    except (WebSocketDisconnect, KeyError):
        # KeyError: a text frame where bytes belong; such a client is not one of ours.
        await typed.put(None)


async def _drain(typed: asyncio.Queue[bytes | None]) -> AsyncIterator[bytes]:
    while (data := await typed.get()) is not None:
        yield data


async def _print(websocket: WebSocket, join: Join, received: AsyncIterator[bytes]) -> None:
    printed = join(received)
    if inspect.isawaitable(printed):
        printed = await printed
    async for data in printed:
        await websocket.send_bytes(data)


async def _tell(websocket: WebSocket, error: BaseException) -> None:
    if isinstance(error, WebSocketDisconnect):
        return
    if not isinstance(error, TranshumeError):
        raise error
    await websocket.send_text(encode_problem(error).decode())
    await websocket.close(CLOSE_PROBLEM)
