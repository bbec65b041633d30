"""HTTP/1.1 between Transhume's own programs, on asyncio's streams and nothing else.

The movers use it: their memory counts, and the commit of a migration is one request on a connection that
stays open. So does the command line, which should not spend its time on loading a library. It knows what
the daemons send, which is bodies with a length or in chunks, and no more of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from transhume.model.errors import HostLost, PeerProtocolError

Target = tuple[str, int] | Path
"""Where a daemon answers: an address and a port, or the path of its local socket."""

CONNECT_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 16 << 20
MAX_HEAD_BYTES = 64 << 10
CHUNK_BYTES = 64 << 10

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


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


class Requests:
    """How to ask one daemon: where it is, what it is called in errors, and which headers go along."""

    def __init__(self, peer: str, target: Target, headers: dict[str, str]) -> None:
        self.peer = peer
        self._target = target
        host = authority(*target) if isinstance(target, tuple) else "localhost"
        self._head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": host, **headers}.items())

    async def connect(self) -> Streams:
        if isinstance(self._target, Path):
            opening = asyncio.open_unix_connection(str(self._target), limit=MAX_HEAD_BYTES)
        else:
            opening = asyncio.open_connection(*self._target, limit=MAX_HEAD_BYTES)
        return await asyncio.wait_for(opening, CONNECT_TIMEOUT_S)

    async def send(self, writer: asyncio.StreamWriter, method: str, path: str, body: bytes | None) -> None:
        content = b"" if body is None else body
        kind = "" if body is None else "Content-Type: application/json\r\n"
        head = f"{method} {path} HTTP/1.1\r\n{self._head}{kind}Content-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode("latin-1") + content)
        await writer.drain()

    async def read_head(self, reader: asyncio.StreamReader) -> Head:
        lines = (await self._read_until(reader, b"\r\n\r\n")).split("\r\n")
        version, _, rest = lines[0].partition(" ")
        status = rest[:3]
        if not version.startswith("HTTP/1.") or not (status.isdigit() and len(status) == 3):
            raise PeerProtocolError(f"{self.peer} does not speak HTTP: {lines[0][:80]!r}")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return Head(int(status), headers)

    async def read_body(self, reader: asyncio.StreamReader, head: Head) -> AsyncIterator[bytes]:
        """The body in pieces as they come, to its end and no further."""
        if head.status in (204, 304):
            return
        if head.headers.get("transfer-encoding", "").lower() == "chunked":
            while (length := await self._chunk_length(reader)) > 0:
                yield await reader.readexactly(length)
                await reader.readexactly(2)
            await self._read_until(reader, b"\r\n")
            return
        left = self._length(head.headers.get("content-length", ""), 10)
        while left > 0:
            piece = await reader.read(min(left, CHUNK_BYTES))
            if not piece:
                raise EOFError("the answer ended early")
            left -= len(piece)
            yield piece

    async def _chunk_length(self, reader: asyncio.StreamReader) -> int:
        line = await self._read_until(reader, b"\r\n")
        return self._length(line.partition(";")[0].strip(), 16)

    async def _read_until(self, reader: asyncio.StreamReader, end: bytes) -> str:
        try:
            return (await reader.readuntil(end)).decode("latin-1")
        except asyncio.LimitOverrunError as error:
            raise PeerProtocolError(f"{self.peer} sent a line of over {MAX_HEAD_BYTES} bytes") from error

    def _length(self, text: str, base: int) -> int:
        try:
            length = int(text, base)
        except ValueError:
            length = -1
        if not 0 <= length <= MAX_ANSWER_BYTES:
            raise PeerProtocolError(
                f"{self.peer} announced an answer of {text[:20]!r} bytes; up to {MAX_ANSWER_BYTES} are read"
            )
        return length

    def lost(self, error: Exception, timeout_s: float) -> HostLost:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, TimeoutError):
            reason = f"no answer within {timeout_s:g} s"
        return HostLost(f"{self.peer} does not answer ({reason or type(error).__name__})")


class HttpConnection:
    """Requests to one daemon, one after the other, on one connection.

    It reconnects when an idle connection was closed. A request that was sent is never sent a second time.
    """

    def __init__(self, peer: str, target: Target, headers: dict[str, str]) -> None:
        self._requests = Requests(peer, target, headers)
        self._streams: Streams | None = None
        self._turn = asyncio.Lock()

    async def request(
        self, method: str, path: str, body: bytes | None, timeout_s: float
    ) -> tuple[int, bytes]:
        """The status and the body of the answer.

        Raises `HostLost` when the peer does not answer in time or the connection breaks; the request may
        have been carried out then. The connection is closed after any error, and made again when needed.
        """
        async with self._turn:
            try:
                return await asyncio.wait_for(self._exchange(method, path, body), timeout_s)
            except (OSError, EOFError, TimeoutError) as error:
                self._drop()
                raise self._requests.lost(error, timeout_s) from error
            except BaseException:
                # Cancelled or confused in the middle of an answer: the next request must not read its rest.
                self._drop()
                raise

    async def close(self) -> None:
        """Close the connection. A later request opens it again."""
        streams, self._streams = self._streams, None
        if streams is not None:
            await _close(streams)

    async def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        reader, writer = await self._connected()
        await self._requests.send(writer, method, path, body)
        head = await self._requests.read_head(reader)
        answer = bytearray()
        async for piece in self._requests.read_body(reader, head):
            answer += piece
            if len(answer) > MAX_ANSWER_BYTES:
                raise PeerProtocolError(f"{self._requests.peer} sent over {MAX_ANSWER_BYTES} bytes")
        if head.headers.get("connection", "").lower() == "close":
            self._drop()
        return head.status, bytes(answer)

    async def _connected(self) -> Streams:
        if self._streams is not None and self._streams[0].at_eof():
            self._drop()
        if self._streams is None:
            self._streams = await self._requests.connect()
        return self._streams

    def _drop(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].transport.abort()


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
    requests = Requests(peer, target, headers)
    streams: Streams | None = None
    try:
        streams = await requests.connect()
        await requests.send(streams[1], method, path, body)
        head = await asyncio.wait_for(requests.read_head(streams[0]), silence_limit_s)
    except (OSError, EOFError, TimeoutError) as error:
        if streams is not None:
            await _close(streams)
        raise requests.lost(error, silence_limit_s) from error
    try:
        yield Answer(head, _patient(requests, streams[0], head, silence_limit_s))
    finally:
        await _close(streams)


async def _patient(
    requests: Requests, reader: asyncio.StreamReader, head: Head, silence_limit_s: float
) -> AsyncIterator[bytes]:
    pieces = aiter(requests.read_body(reader, head))
    while True:
        try:
            piece = await asyncio.wait_for(anext(pieces, b""), silence_limit_s)
        except (OSError, EOFError, TimeoutError) as error:
            raise requests.lost(error, silence_limit_s) from error
        if not piece:
            return
        yield piece


async def _close(streams: Streams) -> None:
    streams[1].close()
    try:
        await streams[1].wait_closed()
    except OSError:
        return
