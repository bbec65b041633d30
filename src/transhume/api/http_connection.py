"""HTTP between Transhume's own programs: the library's client, with this project's errors and limits.

A request that was sent is never sent a second time: a swap that was asked for twice would be two swaps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from transhume.model.errors import HostLost, PeerProtocolError

Target = tuple[str, int] | Path
"""Where a daemon answers: an address and a port, or the path of its local socket."""

CONNECT_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 16 << 20
ONE_CONNECTION = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)


def authority(address: str, port: int) -> str:
    """`address:port` as URLs have it: an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@dataclass(frozen=True)
class Head:
    """The beginning of an answer; the headers' names are in small letters."""

    status: int
    headers: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """An answer whose body comes piece by piece."""

    head: Head
    body: AsyncIterator[bytes]


def _open_client(target: Target, headers: dict[str, str], silence_limit_s: float | None) -> httpx.AsyncClient:
    """A client with one connection that stays open. No proxy of the environment comes in between."""
    local = isinstance(target, Path)
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(
            limits=ONE_CONNECTION, trust_env=False, uds=str(target) if local else None
        ),
        base_url="http://localhost" if isinstance(target, Path) else f"http://{authority(*target)}",
        headers=headers,
        timeout=httpx.Timeout(silence_limit_s, connect=CONNECT_TIMEOUT_S),
        trust_env=False,
    )


def _content_type(body: bytes | None) -> dict[str, str]:
    return {} if body is None else {"Content-Type": "application/json"}


@contextmanager
def _failures_named(peer: str, timeout_s: float) -> Iterator[None]:
    """The library's errors in this project's words."""
    try:
        yield
    except httpx.RemoteProtocolError as error:
        # The same class stands for an answer cut short and for one that is no HTTP.
        if "without sending" in str(error) or "closed connection" in str(error):
            raise HostLost(f"{peer} does not answer ({error})") from error
        raise PeerProtocolError(f"{peer} does not speak HTTP: {error}") from error
    except (TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout) as error:
        raise HostLost(f"{peer} does not answer (no answer within {timeout_s:g} s)") from error
    except (httpx.TransportError, OSError) as error:
        raise HostLost(f"{peer} does not answer ({error})") from error


class HttpConnection:
    """Requests to one daemon, one after the other, on one connection that is kept open in between."""

    def __init__(self, peer: str, target: Target, headers: dict[str, str]) -> None:
        self._peer = peer
        self._target = target
        self._headers = headers
        self._client: httpx.AsyncClient | None = None
        self._turn = asyncio.Lock()

    async def request(
        self, method: str, path: str, body: bytes | None, timeout_s: float
    ) -> tuple[int, bytes]:
        """The status and the body of the answer.

        Raises `HostLost` when the peer does not answer in time or the connection breaks; the request may
        have been carried out then. The connection is closed after any error, and made again when needed.
        """
        async with self._turn:
            if self._client is None:
                self._client = _open_client(self._target, self._headers, None)
            with _failures_named(self._peer, timeout_s):
                async with asyncio.timeout(timeout_s):
                    return await self._exchange(self._client, method, path, body)

    async def close(self) -> None:
        """Close the connection. A later request opens it again."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _exchange(
        self, client: httpx.AsyncClient, method: str, path: str, body: bytes | None
    ) -> tuple[int, bytes]:
        headers = _content_type(body)
        async with client.stream(method, path, content=body, headers=headers) as response:
            announced_bytes = int(response.headers.get("content-length", 0))
            if announced_bytes > MAX_ANSWER_BYTES:
                raise PeerProtocolError(
                    f"{self._peer} announced {announced_bytes} bytes; up to {MAX_ANSWER_BYTES} are read"
                )
            answer = bytearray()
            async for piece in response.aiter_raw():
                answer += piece
                if len(answer) > MAX_ANSWER_BYTES:
                    raise PeerProtocolError(f"{self._peer} sent over {MAX_ANSWER_BYTES} bytes")
            return response.status_code, bytes(answer)


@asynccontextmanager
async def open_answer(
    peer: str,
    target: Target,
    headers: dict[str, str],
    method: str,
    path: str,
    body: bytes | None,
    silence_limit_s: float,
) -> AsyncIterator[Answer]:
    """One request on a connection of its own, whose answer may come slowly and without an end.

    Raises `HostLost`, also out of the body's iterator, when nothing comes for `silence_limit_s` or the
    connection breaks.
    """
    async with _open_client(target, headers, silence_limit_s) as client:
        request = client.build_request(method, path, content=body, headers=_content_type(body))
        with _failures_named(peer, silence_limit_s):
            response = await client.send(request, stream=True)
        try:
            head = Head(response.status_code, dict(response.headers))
            yield Answer(head, _pieces(response, peer, silence_limit_s))
        finally:
            await response.aclose()


async def _pieces(response: httpx.Response, peer: str, silence_limit_s: float) -> AsyncIterator[bytes]:
    pieces = response.aiter_raw()
    while True:
        with _failures_named(peer, silence_limit_s):
            piece = await anext(pieces, b"")
        if not piece:
            return
        yield piece
