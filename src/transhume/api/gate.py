"""Who may come in: the outermost layer of the daemon's application.

The local socket is readable by root alone, so whoever comes through it needs no proof. Over TCP a caller
shows `Authorization: Bearer <host name>:<secret>`, the secret that a host and the controller share. A join
is proven by its token instead. Requests that are too large are refused before their body is read.

Plain ASGI, because a commit passes through here while a VM stands still.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from transhume.api.problem import CONTENT_TYPE, encode_problem
from transhume.model.errors import Refused, TranshumeError, Unauthorized

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 1 << 20

LOCAL = "transhume.local"
"""The key of the scope that marks a request as come through the local socket."""

CALLER = "transhume.caller"
"""The key of the scope that holds the proven host name, or None for a local caller."""

_OPEN_PATHS = frozenset({"/v1/join", "/v1/join/preview", "/v1/clock"})
"""The first two are proven by a token instead, and the clock tells nothing that is not on every wire. A
member passes what comes in by these paths on in its own name, whatever the method: none of them may mean
more than that for another method.
"""


def local(app: App) -> App:
    """The same application for the socket that root alone can reach."""

    async def trusted(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, LOCAL: True}, receive, send)

    return trusted


class Gate:
    """Lets requests through to `app` with their caller's name in the scope.

    `authenticates` says whether a secret is a host's. Paths under /host/ are for the controller and for
    local callers alone, which over TCP means: for whoever knows this host's own secret.
    """

    def __init__(
        self,
        app: App,
        own_name: str,
        authenticates: Callable[[str, str], bool],
    ) -> None:
        self._app = app
        self._own_name = own_name
        self._authenticates = authenticates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            scope[CALLER] = None if scope.get(LOCAL) else self._prove(scope["path"], headers)
        except Unauthorized as error:
            await _refuse(scope, send, error, error.status)
            return
        oversize = _oversize(headers)
        if oversize is not None:
            await _refuse(scope, send, *oversize)
            return
        await self._app(scope, receive, send)

    def _prove(self, path: str, headers: dict[bytes, bytes]) -> str:
        if path in _OPEN_PATHS:
            return ""
        scheme, _, proof = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        name, _, secret = proof.strip().partition(":")
        if scheme.lower() != "bearer" or not self._authenticates(name, secret):
            raise Unauthorized(
                f"host {self._own_name} does not know this caller; was the farm set up anew? Join it again"
            )
        if path.startswith("/host/") and name != self._own_name:
            raise Unauthorized(f"only the controller may ask this of host {self._own_name}")
        return name


def _oversize(headers: dict[bytes, bytes]) -> tuple[TranshumeError, int] | None:
    if headers.get(b"transfer-encoding"):
        return Refused("a request's body needs a Content-Length"), 411
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > MAX_BODY_BYTES:
        return Refused(f"a request's body may have {MAX_BODY_BYTES} bytes"), 413
    return None


async def _refuse(scope: Scope, send: Send, error: TranshumeError, status: int) -> None:
    if scope["type"] == "websocket":
        # Closing before the handshake makes the server answer it with an HTTP error.
        await send({"type": "websocket.close", "code": 1008, "reason": error.message[:100]})
        return
    body = encode_problem(error, status)
    headers = [
        (b"content-type", CONTENT_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        # The body that was announced is not read, so the connection cannot be used again.
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
