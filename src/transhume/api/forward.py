"""A member passes what is asked of the farm on to the controller, so that every command works on any host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
from fastapi import APIRouter, Request, WebSocket
from fastapi.responses import StreamingResponse
from starlette.websockets import WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from transhume.api.console import CLOSE_PROBLEM
from transhume.api.http_connection import authority
from transhume.api.problem import encode_problem
from transhume.host.config import HostConfig
from transhume.model.errors import HostLost

_KEPT_HEADERS = ("content-type", "content-length")

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 3700.0
"""Longer than the longest wait that a request may ask for; a stream beats far more often."""


def bearer(config: HostConfig) -> dict[str, str]:
    """How this host proves itself to the controller, and the controller to it."""
    return {"Authorization": f"Bearer {config.name}:{config.secret}"}


def farm_client(config: HostConfig) -> httpx.AsyncClient:
    """The connections to the controller; whoever makes them closes them."""
    return httpx.AsyncClient(
        base_url=f"http://{authority(config.controller_address, config.controller_port)}",
        headers=bearer(config),
        timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        trust_env=False,
    )


def forward_router(config: HostConfig, client: httpx.AsyncClient) -> APIRouter:
    """All of /v1 at the controller's address."""
    router = APIRouter(prefix="/v1")
    where = authority(config.controller_address, config.controller_port)

    @router.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def forward(request: Request, path: str) -> StreamingResponse:
        kept = {name: value for name in _KEPT_HEADERS if (value := request.headers.get(name))}
        outgoing = client.build_request(
            request.method,
            httpx.URL(path=request.url.path, query=request.url.query.encode()),
            headers=kept,
            content=await request.body(),
        )
        try:
            answer = await client.send(outgoing, stream=True)
        except httpx.TransportError as error:
            raise _lost(where, error) from error
        kept = {name: value for name in _KEPT_HEADERS if (value := answer.headers.get(name))}
        return StreamingResponse(_body(answer), status_code=answer.status_code, headers=kept)

    @router.websocket("/{path:path}")
    async def forward_websocket(websocket: WebSocket, path: str) -> None:
        await websocket.accept()
        try:
            async with connect(
                f"ws://{where}{websocket.url.path}",
                additional_headers=bearer(config),
                open_timeout=CONNECT_TIMEOUT_S,
                proxy=None,
            ) as upstream:
                await _join_both(websocket, upstream)
        except (OSError, WebSocketException) as error:
            await websocket.send_text(encode_problem(_lost(where, error)).decode())
            await websocket.close(CLOSE_PROBLEM)

    return router


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


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
