"""Who may come in: the outermost layer of the daemon's application.

The local socket is readable by root alone, so whoever comes through it needs no proof. Over TCP a caller is
who its certificate names: the handshake has verified it, and here it is asked whether it still opens
anything. A join is proven by its token instead. Requests that are too large are refused before their body is
read.

Plain ASGI, because a commit passes through here while a VM stands still.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from transhume.api.problem import CONTENT_TYPE, encode_problem
from transhume.model.errors import Refused, TranshumeError, Unauthorized
from transhume.trust.names import Peer

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 1 << 20

LOCAL = "transhume.local"
"""The key of the scope that marks a request as come through the local socket."""

PEER = "transhume.peer"
"""The key of the scope that holds the `Peer` of the connection's certificate; absent or None without one."""

CALLER = "transhume.caller"
"""The key of the scope that holds the proven host name, or None for a local caller."""

ON_BEHALF = "transhume-on-behalf"
"""The header with which a controller that does not lead passes a host's request on: its name and serial."""
REASON_HEADER = "x-transhume-reason"
"""Why a change is made, percent-encoded UTF-8."""

_OPEN_PATHS = frozenset({"/v1/join", "/v1/join/preview", "/v1/clock", "/v1/authority"})
"""The first two are proven by a token instead; the clock tells nothing that is not on every wire, and the
authority's certificate proves nobody. A member passes what comes in by these paths on in its own name,
whatever the method: none of them may mean more than that for another method.
"""


def local(app: App) -> App:
    """The same application for the socket that root alone can reach."""

    async def trusted(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, LOCAL: True}, receive, send)

    return trusted


class Gate:
    """Lets requests through to `app` with their caller's name in the scope.

    `admits` says whether a certificate, by its host and serial, opens anything: on a member, none but a
    controller's does. With `takes_tokens` a caller without a certificate may come as far as the guard under
    /v1/, which looks at its token. Paths under /host/ are for controllers and for local callers alone.
    """

    def __init__(
        self, app: App, own_name: str, admits: Callable[[Peer], bool], takes_tokens: bool = False
    ) -> None:
        self._app = app
        self._own_name = own_name
        self._admits = admits
        self._takes_tokens = takes_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            scope[CALLER] = None if scope.get(LOCAL) else self._prove(scope["path"], scope.get(PEER), headers)
            _speak_for(scope, headers)
        except Unauthorized as error:
            await refuse(scope, send, error, error.status)
            return
        oversize = _oversize(headers)
        if oversize is not None:
            await refuse(scope, send, *oversize)
            return
        await self._app(scope, receive, send)

    def _prove(self, path: str, peer: Peer | None, headers: dict[bytes, bytes]) -> str:
        if path in _OPEN_PATHS:
            return ""
        if peer is None and self._takes_tokens and b"authorization" in headers and path.startswith("/v1/"):
            return ""
        if peer is None:
            raise Unauthorized(f"host {self._own_name} demands a certificate of its farm, and none was shown")
        if not self._admits(peer):
            raise Unauthorized(
                f"host {self._own_name} does not take the certificate of host {peer.host}: it was revoked, "
                "or is not one of a controller; a host that was removed must join again"
            )
        if path.startswith("/host/") and not peer.controller:
            raise Unauthorized(f"only the controller may ask this of host {self._own_name}")
        return peer.host


def on_behalf(scope: Scope) -> dict[str, str]:
    """The headers that go with a request that is passed on: who asks, if that is not this host, and why."""
    said = {}
    peer: Peer | None = scope.get(PEER)
    if scope.get(CALLER) and peer is not None:
        said[ON_BEHALF] = f"{peer.host} {peer.serial}"
    reason = dict(scope["headers"]).get(REASON_HEADER.encode())
    if reason is not None:
        said[REASON_HEADER] = reason.decode("latin-1")
    return said


def _speak_for(scope: Scope, headers: dict[bytes, bytes]) -> None:
    """Take another controller's word for who asks: it has seen the certificate, as this one would have."""
    peer: Peer | None = scope.get(PEER)
    said = headers.get(ON_BEHALF.encode())
    if said is None or not scope.get(CALLER) or peer is None or not peer.controller:
        return
    name, _, serial = said.decode("latin-1").partition(" ")
    scope[CALLER], scope[PEER] = name, Peer(name, False, serial)


def _oversize(headers: dict[bytes, bytes]) -> tuple[TranshumeError, int] | None:
    if headers.get(b"transfer-encoding"):
        return Refused("a request's body needs a Content-Length"), 411
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > MAX_BODY_BYTES:
        return Refused(f"a request's body may have {MAX_BODY_BYTES} bytes"), 413
    return None


async def refuse(scope: Scope, send: Send, error: TranshumeError, status: int) -> None:
    """Answer with a problem, and read nothing more of this request."""
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
