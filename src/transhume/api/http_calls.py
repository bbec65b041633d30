"""Requests to one daemon with typed answers: the daemon's errors come back as the classes they were."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar
from urllib.parse import urlencode

from pydantic import BaseModel, TypeAdapter, ValidationError

from transhume.api.http_connection import HttpConnection, Target, TlsMaker
from transhume.api.problem import from_problem
from transhume.model.errors import PeerProtocolError, Refused
from transhume.model.vm import NAME_PATTERN

Answer = TypeVar("Answer")

Body = BaseModel | dict[str, Any] | None
Params = dict[str, Any] | None

MAX_IDLE_CONNECTIONS = 4


def part(name: str) -> str:
    """A name of a host or VM, or an id, as a part of a path. `Refused` for what is none."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise Refused(f"{name!r} is not a name; names have small letters, digits and dashes between them")
    return name


class HttpCalls:
    """One daemon under one prefix. `peer` names it in errors. Calls may be made at the same time."""

    def __init__(self, peer: str, target: Target, prefix: str, tls: TlsMaker | None = None) -> None:
        self.peer = peer
        self.target = target
        self.tls = tls
        self.headers: dict[str, str] = {}
        """Sent with each request of a connection that is made from now on."""
        self._prefix = prefix
        self._idle: list[HttpConnection] = []

    async def ask(
        self,
        method: str,
        path: str,
        kind: type[Answer] | TypeAdapter[Answer],
        body: Body = None,
        params: Params = None,
        timeout_s: float = 30.0,
    ) -> Answer:
        """The answer as a `kind`. Raises what the other end raised, or `HostLost`."""
        content = await self.send(method, path, body, params, timeout_s)
        adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
        try:
            return adapter.validate_json(content)
        except ValidationError as error:
            raise PeerProtocolError(
                f"{self.peer} sent an answer to {path} that cannot be read; is it of another release?"
            ) from error

    async def send(
        self, method: str, path: str, body: Body = None, params: Params = None, timeout_s: float = 30.0
    ) -> bytes:
        """The answer as it came."""
        query = f"?{urlencode(params)}" if params else ""
        connection = (
            self._idle.pop() if self._idle else HttpConnection(self.peer, self.target, self.tls, self.headers)
        )
        try:
            status, content = await connection.request(
                method, f"{self._prefix}{path}{query}", _encode(body), timeout_s
            )
        finally:
            await self._give_back(connection)
        if status >= 400:
            raise from_problem(status, content, self.peer)
        return content

    async def close(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.close()

    async def _give_back(self, connection: HttpConnection) -> None:
        if len(self._idle) < MAX_IDLE_CONNECTIONS:
            self._idle.append(connection)
        else:
            await connection.close()


def _encode(body: Body) -> bytes | None:
    if body is None:
        return None
    return body.model_dump_json().encode() if isinstance(body, BaseModel) else json.dumps(body).encode()
