"""Two channels joined by a TCP connection of this machine, over TLS as between hosts."""

from __future__ import annotations

import contextlib
import functools
import socket
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.trust.identities import credentials, new_authority

from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.wire import Decoder, End
from transhume.trust.cipher import Cipher
from transhume.trust.credentials import ClientTls
from transhume.trust.names import server_name


@functools.cache
def _ends() -> tuple[ClientTls, ssl.SSLContext]:
    authority = new_authority()
    with tempfile.TemporaryDirectory() as folder:
        a, b = (credentials(Path(folder) / host, authority, host) for host in ("a", "b"))
        return a.client(server_name("b")), b.server()


def ciphers() -> tuple[Cipher, Cipher]:
    """For an end `a` that has connected, and an end `b`."""
    a, b = _ends()
    return Cipher(a), Cipher(b)


def prove(at_source: FrameChannel, at_destination: FrameChannel) -> None:
    """The handshake of both ends."""
    with ThreadPoolExecutor(1) as pool:
        proven = pool.submit(at_source.demand_peer, "b")
        at_destination.demand_peer("a")
        proven.result()


@contextlib.contextmanager
def connected(
    block_pages: Sequence[int] = (),
    silence_limit_s: float = 10.0,
    buffer_bytes: int | None = None,
    plain: bool = False,
) -> Iterator[tuple[FrameChannel, FrameChannel]]:
    """The source's end `a` and the destination's end `b`.

    A `buffer_bytes` makes the connection fill early; a `plain` one has no TLS, as the kernel needs it to move
    data alone.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        if buffer_bytes is not None:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        source = socket.create_connection(server.getsockname())
        destination, _ = server.accept()
    if buffer_bytes is not None:
        source.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    a, b = (None, None) if plain else ciphers()
    at_source = FrameChannel(source, Decoder(End.DESTINATION), "host b", silence_limit_s, a)
    at_destination = FrameChannel(destination, Decoder(End.SOURCE, block_pages), "host a", silence_limit_s, b)
    try:
        if not plain:
            prove(at_source, at_destination)
        yield at_source, at_destination
    finally:
        at_source.close()
        at_destination.close()
