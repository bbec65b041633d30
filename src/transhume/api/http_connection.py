"""One HTTP/1.1 connection that stays open, on asyncio's streams and nothing else.

The movers use it: their memory counts, and the commit of a migration is one request on it while the VM
stands still. It knows what the daemons send, which is answers with a Content-Length, and no more of HTTP.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from transhume.model.errors import HostLost, PeerProtocolError

CONNECT_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 4 << 20
MAX_HEAD_BYTES = 64 << 10


def authority(address: str, port: int) -> str:
    """`address:port` as URLs have it: an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class HttpConnection:
    """Requests to one daemon, one after the other. Reconnects when an idle connection was closed.

    `peer` names the other end in errors. A request that was sent is never sent a second time.
    """

    def __init__(self, peer: str, target: tuple[str, int] | Path, headers: dict[str, str]) -> None:
        self._peer = peer
        self._target = target
        host = authority(*target) if isinstance(target, tuple) else "localhost"
        self._head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": host, **headers}.items())
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
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
                reason = getattr(error, "strerror", None) or str(error) or f"no answer within {timeout_s:g} s"
                raise HostLost(f"{self._peer} does not answer ({reason})") from error
            except BaseException:
                # Cancelled or confused in the middle of an answer: the next request must not read its rest.
                self._drop()
                raise

    async def close(self) -> None:
        """Close the connection. A later request opens it again."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].close()
            try:
                await streams[1].wait_closed()
            except OSError:
                return

    async def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        reader, writer = await self._connected()
        content = b"" if body is None else body
        kind = "" if body is None else "Content-Type: application/json\r\n"
        head = f"{method} {path} HTTP/1.1\r\n{self._head}{kind}Content-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode("latin-1") + content)
        await writer.drain()
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except asyncio.LimitOverrunError as error:
            raise PeerProtocolError(f"{self._peer} sent a head of over {MAX_HEAD_BYTES} bytes") from error
        status, headers = self._parse_head(lines)
        length = self._content_length(status, headers)
        answer = await reader.readexactly(length)
        if headers.get("connection", "").lower() == "close":
            self._drop()
        return status, answer

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is not None and self._streams[0].at_eof():
            self._drop()
        if self._streams is None:
            if isinstance(self._target, Path):
                opening = asyncio.open_unix_connection(str(self._target), limit=MAX_HEAD_BYTES)
            else:
                opening = asyncio.open_connection(*self._target, limit=MAX_HEAD_BYTES)
            self._streams = await asyncio.wait_for(opening, CONNECT_TIMEOUT_S)
        return self._streams

    def _drop(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].transport.abort()

    def _parse_head(self, lines: list[str]) -> tuple[int, dict[str, str]]:
        version, _, rest = lines[0].partition(" ")
        status = rest[:3]
        if not version.startswith("HTTP/1.") or not (status.isdigit() and len(status) == 3):
            raise PeerProtocolError(f"{self._peer} does not speak HTTP: {lines[0][:80]!r}")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return int(status), headers

    def _content_length(self, status: int, headers: dict[str, str]) -> int:
        if status in (204, 304):
            return 0
        length = headers.get("content-length", "")
        if not length.isdigit() or int(length) > MAX_ANSWER_BYTES:
            raise PeerProtocolError(
                f"{self._peer} announced an answer of {length or 'unknown'} bytes; "
                f"up to {MAX_ANSWER_BYTES} are read"
            )
        return int(length)
