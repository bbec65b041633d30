"""Two channels joined by a TCP connection of this machine."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence

from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.wire import Decoder, End


@contextlib.contextmanager
def connected(
    block_pages: Sequence[int] = (), silence_limit_s: float = 10.0, buffer_bytes: int | None = None
) -> Iterator[tuple[FrameChannel, FrameChannel]]:
    """The source's end and the destination's end. A `buffer_bytes` makes the connection fill early."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        if buffer_bytes is not None:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        source = socket.create_connection(server.getsockname())
        destination, _ = server.accept()
    if buffer_bytes is not None:
        source.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    at_source = FrameChannel(source, Decoder(End.DESTINATION), "host b", silence_limit_s)
    at_destination = FrameChannel(destination, Decoder(End.SOURCE, block_pages), "host a", silence_limit_s)
    try:
        yield at_source, at_destination
    finally:
        at_source.close()
        at_destination.close()
