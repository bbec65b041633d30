"""Requests of one daemon's client over httpx: foreign errors are turned into ours here and nowhere else."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from transhume.api.http_connection import authority
from transhume.api.problem import from_problem
from transhume.model.errors import HostLost, PeerProtocolError

Answer = TypeVar("Answer")

CONNECT_TIMEOUT_S = 5.0


class HttpCalls:
    """One daemon under one prefix. `peer` names it in errors."""

    def __init__(
        self, peer: str, target: tuple[str, int] | Path, prefix: str, bearer: str | None = None
    ) -> None:
        self.peer = peer
        local = isinstance(target, Path)
        where = "localhost" if isinstance(target, Path) else authority(*target)
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(target)) if local else None,
            base_url=f"http://{where}{prefix}",
            headers={"Authorization": f"Bearer {bearer}"} if bearer else {},
            trust_env=False,
        )

    async def ask(
        self,
        method: str,
        path: str,
        kind: type[Answer] | TypeAdapter[Answer],
        body: BaseModel | dict[str, Any] | None = None,
        params: dict[str, Any] | None = None,
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
        self,
        method: str,
        path: str,
        body: BaseModel | dict[str, Any] | None = None,
        params: dict[str, Any] | None = None,
        timeout_s: float = 30.0,
    ) -> bytes:
        """The answer as it came."""
        if isinstance(body, BaseModel):
            body = body.model_dump(mode="json")
        try:
            answer = await self._client.request(
                method,
                path,
                json=body,
                params=params,
                timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            )
        except httpx.HTTPError as error:
            raise self.lost(error) from error
        if answer.is_error:
            raise from_problem(answer.status_code, answer.content, self.peer)
        return answer.content

    def stream(
        self, path: str, params: dict[str, Any], silence_limit_s: float
    ) -> AbstractAsyncContextManager[httpx.Response]:
        """An httpx stream; the caller turns `httpx.HTTPError` into `lost`."""
        timeout = httpx.Timeout(silence_limit_s, connect=CONNECT_TIMEOUT_S)
        return self._client.stream("GET", path, params=params, timeout=timeout)

    def lost(self, error: Exception) -> HostLost:
        return HostLost(f"{self.peer} does not answer ({str(error) or type(error).__name__})")

    async def close(self) -> None:
        await self._client.aclose()
