"""One connection to one etcd member: JSON over HTTP, one exchange after the other.

The protocol is h11's, the sockets are asyncio's, because a VM stands still while its commit is asked for (see
decision 12). What matters here is to know whether a request has left: `NotSent` is certain, `AnswerLost` is
not, and they are never mixed up.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import ssl
from dataclasses import dataclass

import h11

CONNECT_TIMEOUT_S = 1.0
MAX_ANSWER_BYTES = 256 << 20
_MAX_HEAD_BYTES = 64 << 10
_READ_BYTES = 256 << 10


class NotSent(Exception):
    """The member never got the request, so it was certainly not carried out. The text says why."""


class AnswerLost(Exception):
    """The request has left and no whole answer came: it was carried out, or not, or will be.

    The text says why.
    """


@dataclass(frozen=True)
class Endpoint:
    """Where one member listens for clients."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class EtcdConnection:
    """An open connection. After any error, and after a cancellation, it must be closed by its user."""

    def __init__(
        self, endpoint: Endpoint, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._endpoint = endpoint
        self._reader = reader
        self._writer = writer
        self._protocol = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)

    @classmethod
    async def open(cls, endpoint: Endpoint, tls: ssl.SSLContext | None) -> EtcdConnection:
        """Connect within `CONNECT_TIMEOUT_S`. Raises `NotSent`."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=tls)
        except TimeoutError as error:
            raise NotSent(f"no connection within {CONNECT_TIMEOUT_S:g} s") from error
        except OSError as error:
            raise NotSent(_words(error)) from error
        return cls(endpoint, reader, writer)

    async def exchange(
        self, path: str, body: bytes, headers: dict[str, str], timeout_s: float
    ) -> tuple[int, bytes]:
        """POST `body` and return the status and the body of the answer. Raises `AnswerLost`."""
        request = h11.Request(
            method="POST",
            target=path,
            headers=[
                ("Host", str(self._endpoint)),
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                *headers.items(),
            ],
        )
        encoded = b"".join(
            self._protocol.send(event) or b"" for event in (request, h11.Data(body), h11.EndOfMessage())
        )
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(encoded)
                await self._writer.drain()
                return await self._answer()
        except TimeoutError as error:
            raise AnswerLost(f"no answer within {timeout_s:g} s") from error
        except h11.RemoteProtocolError as error:
            reason = (
                "it closed the connection" if self._reader.at_eof() else f"it does not speak HTTP: {error}"
            )
            raise AnswerLost(reason) from error
        except OSError as error:
            raise AnswerLost(f"the connection broke ({error.strerror or error})") from error

    async def _answer(self) -> tuple[int, bytes]:
        status = 0
        body = bytearray()
        while True:
            event = self._protocol.next_event()
            if event is h11.NEED_DATA:
                self._protocol.receive_data(await self._reader.read(_READ_BYTES))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MAX_ANSWER_BYTES:
                    raise AnswerLost(f"its answer is over {MAX_ANSWER_BYTES} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return status, bytes(body)
            elif event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                raise AnswerLost("it closed the connection")

    def ready_for_next(self) -> bool:
        """Whether both ends have said all of this exchange, and mean to go on."""
        if self._protocol.our_state is not h11.DONE or self._protocol.their_state is not h11.DONE:
            return False
        if self._protocol.trailing_data[0]:
            return False
        self._protocol.start_next_cycle()
        return True

    def ended(self) -> bool:
        """Whether the member has closed the connection since the last exchange."""
        if self._reader.at_eof() or self._writer.is_closing():
            return True
        # The event loop may not have come round to it yet; whatever can be read between two exchanges is
        # the end of the connection, or as bad.
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Let go of the socket at once: the farewell of TLS would wait for the other end's."""
        self._writer.transport.abort()


def _words(error: OSError) -> str:
    """Why a connection could not be made, without the address, which asyncio puts into the text."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason}"
    if isinstance(error, socket.gaierror) or not error.errno:
        return error.strerror or str(error)
    return os.strerror(error.errno).lower()
