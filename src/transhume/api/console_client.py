"""The client's end of a console: a WebSocket to a daemon, over TCP or over its local socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from transhume.api.http_connection import authority
from transhume.api.problem import from_problem
from transhume.model.errors import HostLost, Unauthorized

OPEN_TIMEOUT_S = 10.0


async def join_console(
    peer: str,
    target: tuple[str, int] | Path,
    path: str,
    bearer: str | None,
    received: AsyncIterator[bytes],
) -> AsyncIterator[bytes]:
    """What the guest prints, while what `received` gives is typed; ends when either side does.

    Raises what the other end told as a problem, and `HostLost` when the connection breaks.
    """
    headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
    try:
        async with _open(target, path, headers) as connection:
            typing = asyncio.create_task(_type(connection, received), name="console input")
            try:
                async for data in connection:
                    if isinstance(data, str):
                        raise from_problem(200, data.encode(), peer)
                    yield data
            finally:
                typing.cancel()
                await asyncio.gather(typing, return_exceptions=True)
    except InvalidStatus as error:
        if error.response.status_code == 403:
            raise Unauthorized(f"{peer} does not know this caller") from error
        raise HostLost(f"{peer} does not offer a console ({error})") from error
    except (OSError, WebSocketException) as error:
        raise HostLost(f"{peer} does not answer ({error})") from error


async def _type(connection: ClientConnection, received: AsyncIterator[bytes]) -> None:
    try:
        async for data in received:
            await connection.send(data)
    except ConnectionClosed:
        return
    await connection.close()


def _open(target: tuple[str, int] | Path, path: str, headers: dict[str, str]) -> connect:
    if isinstance(target, Path):
        return unix_connect(
            str(target),
            f"ws://localhost{path}",
            additional_headers=headers,
            open_timeout=OPEN_TIMEOUT_S,
            compression=None,
        )
    return connect(
        f"ws://{authority(*target)}{path}",
        additional_headers=headers,
        open_timeout=OPEN_TIMEOUT_S,
        compression=None,
        proxy=None,
    )
