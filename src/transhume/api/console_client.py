"""The client's end of a console: a WebSocket to a daemon, over TCP or over its local socket."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from transhume.api.http_connection import TlsMaker, authority
from transhume.api.problem import from_problem
from transhume.model.errors import HostLost, Unauthorized
from transhume.trust.credentials import refusal

OPEN_TIMEOUT_S = 10.0


async def join_console(
    peer: str,
    target: tuple[str, int] | Path,
    path: str,
    tls: TlsMaker | None,
    received: AsyncIterator[bytes],
) -> AsyncIterator[bytes]:
    """What the guest prints, while what `received` gives is typed; ends when either side does.

    Raises what the other end told as a problem, and `HostLost` when the connection breaks.
    """
    try:
        async with _open(target, path, tls) as connection:
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
    except ssl.SSLError as error:
        raise refusal(error, peer) from error
    except (OSError, WebSocketException) as error:
        raise HostLost(f"{peer} does not answer ({error})") from error


async def _type(connection: ClientConnection, received: AsyncIterator[bytes]) -> None:
    try:
        async for data in received:
            await connection.send(data)
    except ConnectionClosed:
        return
    await connection.close()


def _open(target: tuple[str, int] | Path, path: str, tls: TlsMaker | None) -> connect:
    if isinstance(target, Path):
        return unix_connect(
            str(target),
            f"ws://localhost{path}",
            open_timeout=OPEN_TIMEOUT_S,
            compression=None,
        )
    demanded = tls() if tls is not None else None
    return connect(
        f"{'wss' if demanded else 'ws'}://{authority(*target)}{path}",
        ssl=demanded.context if demanded else None,
        server_hostname=demanded.server_name if demanded else None,
        open_timeout=OPEN_TIMEOUT_S,
        compression=None,
        proxy=None,
    )
