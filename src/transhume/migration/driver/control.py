"""The mover's control socket: the daemon listens to updates and passes on a person's wishes.

One JSON object a line, both ways. From the mover: `{"update": {...}}`, `{"prepared": {...}}` and, as the
answer to a cancel, `{"cancelled": {...}}`, to an adjustment `{"adjusted": {...}}`, to a revival
`{"revived": {...}}`. To the mover: `{"command": "cancel"}`, `{"command": "adjust", "adjustment": {...}}` and
`{"command": "revive"}`.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from transhume.model.orders import (
    Adjustment,
    AdjustReply,
    CancelReply,
    MigrationUpdate,
    Prepared,
    ReviveReply,
)

LINE_LIMIT_BYTES = 4 << 20
CLOSE_LIMIT_S = 1.0


class ControlServer:
    """Serves a mover's control socket to any number of daemons, one after the other or at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.cancel: Callable[[], Awaitable[CancelReply]] | None = None
        self.adjust: Callable[[Adjustment], AdjustReply] | None = None
        self.revive: Callable[[], Awaitable[ReviveReply]] | None = None
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._latest: dict[str, bytes] = {}

    async def open(self) -> None:
        """Start to listen; a socket left by a dead predecessor is replaced.

        Raises `OSError` when the path cannot be listened at; nothing is open then.
        """
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=LINE_LIMIT_BYTES)
        except BaseException:
            listener.close()
            raise

    def publish(self, update: MigrationUpdate) -> None:
        """Send an update to whoever listens now, and the latest one to whoever comes later."""
        self._send("update", update.model_dump(mode="json"))

    def prepared(self, prepared: Prepared) -> None:
        """Say where the destination waits."""
        self._send("prepared", prepared.model_dump(mode="json"))

    async def close(self) -> None:
        """Stop to listen and end the connections, after what was sent has gone.

        A daemon that does not read holds this up for `CLOSE_LIMIT_S`, and loses the rest.
        """
        if self._server is not None:
            self._server.close()
        # Each connection takes itself off the list when it ends.
        for writer in list(self._writers):
            try:
                async with asyncio.timeout(CLOSE_LIMIT_S):
                    writer.close()
                    await writer.wait_closed()
            except (OSError, TimeoutError):
                writer.transport.abort()
        self._path.unlink(missing_ok=True)

    def _send(self, key: str, body: dict[str, Any]) -> None:
        line = json.dumps({key: body}).encode() + b"\n"
        self._latest[key] = line
        for writer in self._writers:
            writer.write(line)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            for line in list(self._latest.values()):
                writer.write(line)
            while line := await reader.readline():
                message = _message(line)
                if message.get("command") == "cancel" and self.cancel is not None:
                    _answer(writer, "cancelled", await self.cancel())
                elif message.get("command") == "adjust" and self.adjust is not None:
                    adjustment = Adjustment.model_validate(message.get("adjustment"))
                    _answer(writer, "adjusted", self.adjust(adjustment))
                elif message.get("command") == "revive" and self.revive is not None:
                    _answer(writer, "revived", await self.revive())
        except (OSError, ValueError):
            pass  # a daemon that died or spoke nonsense loses its connection, nothing else
        finally:
            self._writers.remove(writer)
            writer.close()


def _answer(writer: asyncio.StreamWriter, key: str, reply: BaseModel) -> None:
    writer.write(json.dumps({key: reply.model_dump(mode="json")}).encode() + b"\n")


def _message(line: bytes) -> dict[str, Any]:
    """What a line asks for. Raises `ValueError` when it is no JSON object."""
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("brackets without end") from None
    if not isinstance(message, dict):
        raise ValueError("no object")
    return message
