"""Answers that come piece by piece, on the library's client, with this project's errors and limits.

A mover never imports this: the library would be a tenth of its memory (see `api.http_connection`).
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from transhume.api.http_connection import CONNECT_TIMEOUT_S, Target, TlsMaker, authority, content_type
from transhume.model.errors import HostLost, PeerProtocolError
from transhume.trust.credentials import ClientTls, refusal

ONE_CONNECTION = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)


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


def _open_client(target: Target, tls: ClientTls | None, silence_limit_s: float | None) -> httpx.AsyncClient:
    """A client with one connection that stays open. No proxy of the environment comes in between."""
    local = isinstance(target, Path)
    scheme = "http" if tls is None else "https"
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(
            verify=tls.context if tls else True,
            limits=ONE_CONNECTION,
            trust_env=False,
            uds=str(target) if local else None,
        ),
        base_url="http://localhost" if isinstance(target, Path) else f"{scheme}://{authority(*target)}",
        timeout=httpx.Timeout(silence_limit_s, connect=CONNECT_TIMEOUT_S),
        trust_env=False,
    )


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
        refused = _tls_error(error)
        if refused is not None:
            raise refusal(refused, peer) from error
        raise HostLost(f"{peer} does not answer ({error})") from error


def _tls_error(error: BaseException | None) -> ssl.SSLError | None:
    """What the library has wrapped: its own errors keep the words of TLS, and not the reason."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return error
        error = error.__cause__ or error.__context__
    return None


@asynccontextmanager
async def open_answer(
    peer: str,
    target: Target,
    tls: TlsMaker | None,
    method: str,
    path: str,
    body: bytes | None,
    silence_limit_s: float,
    headers: dict[str, str] | None = None,
) -> AsyncIterator[Answer]:
    """One request on a connection of its own, whose answer may come slowly and without an end.

    Raises `HostLost`, also out of the body's iterator, when nothing comes for `silence_limit_s` or the
    connection breaks.
    """
    demanded = tls() if tls is not None else None
    extensions = {"sni_hostname": demanded.server_name} if demanded else {}
    async with _open_client(target, demanded, silence_limit_s) as client:
        request = client.build_request(
            method,
            path,
            content=body,
            headers={**(headers or {}), **content_type(body)},
            extensions=extensions,
        )
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
