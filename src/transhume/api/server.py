"""Serves the daemon's application on TCP and on the local socket, in the daemon's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from transhume.api.gate import PEER, App, Receive, Scope, Send, local
from transhume.host.config import HostConfig
from transhume.model.errors import Conflict, Refused
from transhume.trust.names import peer_of
from transhume.trust.telling import TellingSSLObject

KEEP_ALIVE_S = 3600
"""A mover's connection must still be warm when it commits, which may be long after its last request."""

MAX_SOCKET_PATH_BYTES = 107


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: the daemon decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _proven(app: App, transport: asyncio.BaseTransport) -> App:
    """`app`, told in each request's scope whose certificate the connection has shown."""
    peer = peer_of(transport.get_extra_info("ssl_object"))

    async def told(scope: Scope, receive: Receive, send: Send) -> None:
        scope[PEER] = peer
        await app(scope, receive, send)

    return told


class _ProvenHttp(H11Protocol):
    """Uvicorn's own protocol, but for the certificate, which it keeps to itself."""

    def connection_made(  # type: ignore[override]
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        self.app = _proven(self.app, transport)


class _ProvenWebSocket(WebSocketsSansIOProtocol):
    """The same for WebSockets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.app = _proven(self.app, transport)


async def serve(
    app: App, config: HostConfig, tls: ssl.SSLContext, ready: asyncio.Event, stop: asyncio.Event
) -> None:
    """Answer at `config.address`:`config.port`, over `tls` alone, and at `config.api_socket` until `stop`.

    `ready` is set when both accept connections. Raises `Conflict` when another daemon answers at either
    place and `Refused` when the address is not this machine's; nothing is left open then. Streams end when
    the controller closes, so close it before or soon after setting `stop`.
    """
    tls.sslobject_class = TellingSSLObject
    with contextlib.ExitStack() as sockets:
        wide = sockets.enter_context(_tcp_socket(config.address, config.port))
        near = sockets.enter_context(_local_socket(config.api_socket))
        try:
            await _serve_both(app, tls, wide, near, ready, stop)
        finally:
            config.api_socket.unlink(missing_ok=True)


async def _serve_both(
    app: App,
    tls: ssl.SSLContext,
    wide: socket.socket,
    near: socket.socket,
    ready: asyncio.Event,
    stop: asyncio.Event,
) -> None:
    servers = {_server(app, tls): wide, _server(local(app), None): near}
    running = [
        asyncio.create_task(server.serve(sockets=[listening]), name="api")
        for server, listening in servers.items()
    ]
    stopping = asyncio.create_task(stop.wait(), name="stop of the api")
    try:
        while not all(server.started or task.done() for server, task in zip(servers, running, strict=True)):
            await asyncio.sleep(0.005)
        ready.set()
        await asyncio.wait({stopping, *running}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*running)


def _server(app: App, tls: ssl.SSLContext | None) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            ws=_ProvenWebSocket if tls is not None else WebSocketsSansIOProtocol,
            ws_max_size=1 << 20,
            ws_per_message_deflate=False,
            http=_ProvenHttp if tls is not None else H11Protocol,
            ssl_context_factory=None if tls is None else lambda _config, _default: tls,
            loop="asyncio",
        )
    )


def _tcp_socket(address: str, port: int) -> socket.socket:
    try:
        (family, kind, protocol, _, where), *_ = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise Refused(f"the address {address} cannot be resolved: {error.strerror}") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
    except OSError as error:
        listening.close()
        raise Conflict(
            f"cannot listen at {address} port {port}: {error.strerror}; is another daemon running, or is the "
            "address not one of this machine?"
        ) from error
    return listening


def _local_socket(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise Refused(f"the path {path} is too long for a socket; choose a shorter --state-dir")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _answers(path):
            raise Conflict(f"another daemon answers at {path}; `transhume down` ends it")
        path.unlink(missing_ok=True)
        # The mode must be right from the first moment: the umask is the only way to make it so.
        umask = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(umask)
    except BaseException:
        listening.close()
        raise
    return listening


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
