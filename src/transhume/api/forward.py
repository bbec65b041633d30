"""A member passes what is asked of the farm on to the controller, so that every command works on any host."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from functools import partial

from fastapi import APIRouter, Request, WebSocket
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from transhume.api.console import CLOSE_PROBLEM
from transhume.api.gate import on_behalf
from transhume.api.http_connection import TlsMaker, authority
from transhume.api.http_stream import Answer, open_answer
from transhume.api.problem import encode_problem
from transhume.model.errors import HostLost, TranshumeError
from transhume.trust.credentials import Credentials
from transhume.trust.names import CONTROLLER_NAME

log = logging.getLogger(__name__)

LAST_EVENT_ID = "last-event-id"

_KEPT_HEADERS = ("content-type", "content-length")

OPEN_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 3700.0
"""Longer than the longest wait that a request may ask for; a stream beats far more often."""


Controller = Callable[[], tuple[str, int]]
"""Where the controller answers now. Raises `TranshumeError` when nobody knows."""


def forward_router(controller: Controller, credentials: Credentials, prefix: str = "/v1") -> APIRouter:
    """All of `prefix` at the controller's address."""
    router = APIRouter(prefix=prefix)
    tls = partial(credentials.client, CONTROLLER_NAME)

    @router.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def forward(request: Request, path: str) -> Response:
        query = f"?{request.url.query}" if request.url.query else ""
        last_id = request.headers.get(LAST_EVENT_ID, "")
        if last_id.isascii() and last_id.isdigit():
            # Headers stay here: a stream that is taken up again says the same in its address.
            query += f"{'&' if query else '?'}after={last_id}"
        raw_path = request.scope["raw_path"].decode("latin-1")
        return _Forwarded(controller(), tls, request.method, f"{raw_path}{query}", await request.body())

    @router.websocket("/{path:path}")
    async def forward_websocket(websocket: WebSocket, path: str) -> None:
        await websocket.accept()
        where = "an unknown address"
        try:
            where = authority(*controller())
            demanded = tls()
            async with connect(
                f"wss://{where}{websocket.url.path}",
                ssl=demanded.context,
                server_hostname=demanded.server_name,
                open_timeout=OPEN_TIMEOUT_S,
                proxy=None,
            ) as upstream:
                await _join_both(websocket, upstream)
        except (OSError, WebSocketException, TranshumeError) as error:
            told = error if isinstance(error, TranshumeError) else _lost(where, error)
            await websocket.send_text(encode_problem(told).decode())
            await websocket.close(CLOSE_PROBLEM)

    return router


class _Forwarded(Response):
    """The controller's answer, passed on piece by piece while the connection to it is open."""

    def __init__(
        self, target: tuple[str, int], tls: TlsMaker, method: str, path: str, content: bytes
    ) -> None:
        super().__init__()
        self._target = target
        self._tls = tls
        self._method = method
        self._path = path
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with open_answer(
            f"the controller at {authority(*self._target)}",
            self._target,
            self._tls,
            self._method,
            self._path,
            self._content or None,
            ANSWER_TIMEOUT_S,
            on_behalf(scope),
        ) as answer:
            headers = answer.head.headers
            kept = {name: headers[name] for name in _KEPT_HEADERS if name in headers}
            passing = StreamingResponse(_body(answer), status_code=answer.head.status, headers=kept)
            await passing(scope, receive, send)


async def _body(answer: Answer) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.body:
            yield piece
    except HostLost as error:
        # The head has gone out, so all that is left is to end early, which the caller notices.
        log.warning("an answer was passed on in part: %s", error.message)


async def _join_both(websocket: WebSocket, upstream: ClientConnection) -> None:
    up = asyncio.create_task(_up(websocket, upstream), name="console to controller")
    down = asyncio.create_task(_down(websocket, upstream), name="console from controller")
    try:
        await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        if not up.done():
            await down
            await websocket.close(upstream.close_code or CLOSE_PROBLEM)
    finally:
        up.cancel()
        down.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


async def _up(websocket: WebSocket, upstream: ClientConnection) -> None:
    try:
        while True:
            await upstream.send(await websocket.receive_bytes())
    except (WebSocketDisconnect, KeyError, ConnectionClosed):
        return


async def _down(websocket: WebSocket, upstream: ClientConnection) -> None:
    async for data in upstream:
        if isinstance(data, str):
            await websocket.send_text(data)
        else:
            await websocket.send_bytes(data)


def _lost(where: str, error: Exception) -> HostLost:
    reason = str(error) or type(error).__name__
    return HostLost(
        f"the controller at {where} does not answer ({reason}); look at its daemon and the network"
    )
