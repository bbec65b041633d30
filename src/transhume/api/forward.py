"""A member passes what is asked of the farm on to the controller, so that every command works on any host."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial

from fastapi import APIRouter, Request, WebSocket
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from transhume.api.console import CLOSE_PROBLEM
from transhume.api.gate import REASON_HEADER
from transhume.api.http_connection import TlsMaker, authority
from transhume.api.http_stream import Answer, open_answer
from transhume.api.problem import encode_problem
from transhume.host.config import HostConfig
from transhume.model.errors import HostLost
from transhume.trust.credentials import Credentials
from transhume.trust.names import CONTROLLER_NAME

log = logging.getLogger(__name__)

_KEPT_HEADERS = ("content-type", "content-length")

OPEN_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 3700.0
"""Longer than the longest wait that a request may ask for; a stream beats far more often."""


def forward_router(config: HostConfig, credentials: Credentials) -> APIRouter:
    """All of /v1 at the controller's address."""
    router = APIRouter(prefix="/v1")
    tls = partial(credentials.client, CONTROLLER_NAME)
    where = authority(config.controller_address, config.controller_port)

    @router.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def forward(request: Request, path: str) -> Response:
        query = f"?{request.url.query}" if request.url.query else ""
        raw_path = request.scope["raw_path"].decode("latin-1")
        return _Forwarded(
            config, tls, request.method, f"{raw_path}{query}", await request.body(), _passed_on(request)
        )

    @router.websocket("/{path:path}")
    async def forward_websocket(websocket: WebSocket, path: str) -> None:
        await websocket.accept()
        try:
            demanded = tls()
            async with connect(
                f"wss://{where}{websocket.url.path}",
                ssl=demanded.context,
                server_hostname=demanded.server_name,
                open_timeout=OPEN_TIMEOUT_S,
                proxy=None,
            ) as upstream:
                await _join_both(websocket, upstream)
        except (OSError, WebSocketException) as error:
            await websocket.send_text(encode_problem(_lost(where, error)).decode())
            await websocket.close(CLOSE_PROBLEM)

    return router


def _passed_on(request: Request) -> dict[str, str]:
    """Why it is asked, which the controller notes."""
    reason = request.headers.get(REASON_HEADER)
    return {} if reason is None else {REASON_HEADER: reason}


class _Forwarded(Response):
    """The controller's answer, passed on piece by piece while the connection to it is open."""

    def __init__(
        self,
        config: HostConfig,
        tls: TlsMaker,
        method: str,
        path: str,
        content: bytes,
        headers: dict[str, str],
    ) -> None:
        super().__init__()
        self._config = config
        self._tls = tls
        self._method = method
        self._path = path
        self._content = content
        self._passed_on = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with open_answer(
            *_controller(self._config),
            self._tls,
            self._method,
            self._path,
            self._content or None,
            ANSWER_TIMEOUT_S,
            self._passed_on,
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


def _controller(config: HostConfig) -> tuple[str, tuple[str, int]]:
    target = (config.controller_address, config.controller_port)
    return f"the controller at {authority(*target)}", target


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
