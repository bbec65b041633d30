"""HTTP between Transhume's own programs: one exchange after the other on a connection that stays open.

The protocol is h11's, the sockets are asyncio's. A VM stands still while its commit is asked for, and a mover
is kept small: the usual client takes three milliseconds for an exchange where this takes one.

A request that was sent is never sent a second time: a swap that was asked for twice would be two swaps.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import ssl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import h11

from transhume.model.errors import HostLost, PeerProtocolError
from transhume.trust.credentials import ClientTls, refusal

Target = tuple[str, int] | Path
"""Where a daemon answers: an address and a port, or the path of its local socket."""

TlsMaker = Callable[[], ClientTls]
"""Asked at each new connection, so that a renewed certificate is used from then on."""

CONNECT_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 16 << 20
MAX_HEAD_BYTES = 64 << 10
_READ_BYTES = 64 << 10


def authority(address: str, port: int) -> str:
    """`address:port` as URLs have it: an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def content_type(body: bytes | None) -> dict[str, str]:
    """The header that goes with a body; none without."""
    return {} if body is None else {"Content-Type": "application/json"}


class HttpConnection:
    """Requests to one daemon, one after the other, on one connection that is kept open in between."""

    def __init__(
        self, peer: str, target: Target, tls: TlsMaker | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self._headers = dict(headers or {})
        self._peer = peer
        self._target = target
        self._tls = tls
        self._host = "localhost" if isinstance(target, Path) else authority(*target)
        self._open: _Open | None = None
        self._turn = asyncio.Lock()

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """The status and the body of the answer. `headers` go out beside the usual ones.

        Raises `HostLost` when the peer does not answer in time or the connection breaks; the request may
        have been carried out then. The connection is closed after any error, and made again when needed.
        """
        async with self._turn:
            try:
                with self._failures_named(timeout_s):
                    async with asyncio.timeout(timeout_s):
                        opened = await self._demand_open()
                        said = {"Host": self._host, **self._headers, **content_type(body), **(headers or {})}
                        await opened.ask(method, path, said, body)
                        answer = await opened.answer(self._peer)
            except BaseException:
                # Also when this was cancelled: a late answer must not be taken for that of the next request.
                await self.close()
                raise
            if not opened.ready_for_next():
                await self.close()
            return answer

    async def retire(self) -> None:
        """Close the connection as soon as the request under way, if any, is answered."""
        async with self._turn:
            await self.close()

    async def close(self) -> None:
        """Close the connection. A later request opens it again."""
        opened, self._open = self._open, None
        if opened is not None:
            await opened.close()

    async def _demand_open(self) -> _Open:
        if self._open is not None and self._open.ended():
            await self.close()
        if self._open is None:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if isinstance(self._target, Path):
                    streams = await asyncio.open_unix_connection(str(self._target))
                else:
                    tls = self._tls() if self._tls is not None else None
                    streams = await asyncio.open_connection(
                        *self._target,
                        ssl=tls.context if tls else None,
                        server_hostname=tls.server_name if tls else None,
                    )
            self._open = _Open(*streams)
        return self._open

    @contextlib.contextmanager
    def _failures_named(self, timeout_s: float) -> Iterator[None]:
        """The errors of sockets and of the protocol in this project's words."""
        try:
            yield
        except ssl.SSLError as error:
            raise refusal(error, self._peer) from error
        except h11.RemoteProtocolError as error:
            if self._open is not None and self._open.cut_off():
                raise HostLost(f"{self._peer} does not answer (it closed the connection)") from error
            raise PeerProtocolError(f"{self._peer} does not speak HTTP: {error}") from error
        except TimeoutError as error:
            raise HostLost(f"{self._peer} does not answer (no answer within {timeout_s:g} s)") from error
        except OSError as error:
            raise HostLost(f"{self._peer} does not answer ({error})") from error


class _Open:
    """One connection, and how far its exchange is."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._protocol = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)

    async def ask(self, method: str, path: str, headers: dict[str, str], body: bytes | None) -> None:
        lengths = {} if body is None else {"Content-Length": str(len(body))}
        request = h11.Request(method=method, target=path, headers=list({**headers, **lengths}.items()))
        encoded = self._protocol.send(request) or b""
        if body:
            encoded += self._protocol.send(h11.Data(body)) or b""
        encoded += self._protocol.send(h11.EndOfMessage()) or b""
        self._writer.write(encoded)
        await self._writer.drain()

    async def answer(self, peer: str) -> tuple[int, bytes]:
        status = 0
        body = bytearray()
        while True:
            event = self._protocol.next_event()
            if event is h11.NEED_DATA:
                self._protocol.receive_data(await self._reader.read(_READ_BYTES))
            elif isinstance(event, h11.Response):
                status = event.status_code
                _demand_announced(dict(event.headers), peer)
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MAX_ANSWER_BYTES:
                    raise PeerProtocolError(f"{peer} sent over {MAX_ANSWER_BYTES} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return status, bytes(body)
            elif event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                raise HostLost(f"{peer} does not answer (it closed the connection)")

    def ready_for_next(self) -> bool:
        """Whether both ends have said all of this exchange, and mean to go on."""
        if self._protocol.our_state is not h11.DONE or self._protocol.their_state is not h11.DONE:
            return False
        if self._protocol.trailing_data[0]:
            return False  # an answer to nothing: whatever it is, the next request's it is not
        self._protocol.start_next_cycle()
        return True

    def cut_off(self) -> bool:
        """Whether the peer has closed the connection in the middle of its answer."""
        return self._reader.at_eof()

    def ended(self) -> bool:
        """Whether the peer has closed the connection, as it may between two exchanges."""
        if self._reader.at_eof() or self._writer.is_closing():
            return True
        # The event loop may not have come round to it yet; whatever is to be read now ends the connection.
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def close(self) -> None:
        """Drop what was not sent yet: a request that was given up must not arrive later. TLS's own farewell
        would wait for the other end's, and HTTP needs none.
        """
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def _demand_announced(headers: dict[bytes, bytes], peer: str) -> None:
    announced_bytes = int(headers.get(b"content-length", b"0"))
    if announced_bytes > MAX_ANSWER_BYTES:
        raise PeerProtocolError(
            f"{peer} announced {announced_bytes} bytes; up to {MAX_ANSWER_BYTES} are read"
        )
