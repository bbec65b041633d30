"""One connection between two movers, in frames, over a blocking socket.

Threads: any thread may send, and a frame is never mixed with another's; one thread receives. Any thread
may call `shutdown`, which ends every blocked call of the others with `HostLost`.

Every failure of the connection is a `HostLost` that names the peer, and is final: after it nothing more
is sent, for half a frame may be on its way. Whoever is silent for `silence_limit_s` counts as lost: the
kernel watches for it on reads (SO_RCVTIMEO), writes (SO_SNDTIMEO) and data that is never acknowledged
(TCP_USER_TIMEOUT), so that no call polls.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transhume.memory.syscalls import held
from transhume.migration import wire
from transhume.migration.wire import Bytes, Decoder, Header, Message
from transhume.model.errors import HostLost

_KEEPALIVE_IDLE_S = 5
_KEEPALIVE_INTERVAL_S = 2
_KEEPALIVE_PROBES = 3

_PIECE_BYTES = 64 << 10
_TCP_INFO_BYTES = 168
_MIN_RTT_AT = 148
_DELIVERY_RATE_AT = 160
_UNKNOWN_RTT_US = 10_000_000
"""Where struct tcp_info (linux/tcp.h) has the least round trip and the rate of delivery."""


class FrameChannel:
    """Frames to and from one peer. Takes the connected socket over and sets it up.

    `peer` names the other end in messages. `decoder` says what it may send; the caller completes it
    (version, RAM blocks) as the connection is opened. `sent_bytes` and `received_bytes` count all that
    went over the wire; read them from any thread.
    """

    def __init__(self, sock: socket.socket, decoder: Decoder, peer: str, silence_limit_s: float) -> None:
        self.decoder = decoder
        self.peer = peer
        self.sent_bytes = 0
        self.received_bytes = 0
        self._socket = sock
        self._silence_limit_s = silence_limit_s
        self._sending = threading.RLock()
        self._failure: str | None = None
        self._header = memoryview(bytearray(wire.HEADER_BYTES))
        _set_up(sock, silence_limit_s)

    def limit_silence(self, silence_limit_s: float) -> None:
        """From now on the peer counts as lost after so long."""
        self._silence_limit_s = silence_limit_s
        _set_up(self._socket, silence_limit_s)

    @property
    def version(self) -> int:
        """The version of the protocol that is spoken: the agreed one, our newest until then."""
        return self.decoder.version or wire.VERSION

    def fileno(self) -> int:
        """The socket's descriptor, for a receiver that lets the kernel move the data."""
        return self._socket.fileno()

    def wait_for_ever(self) -> None:
        """Let reads wait as long as it takes, for a connection on which silence is usual.

        A peer that is gone is still noticed, by the kernel's own probes.
        """
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))

    def keep_queue_short(self, least_bytes: int) -> None:
        """Let the kernel hold little more unsent data than the path carries in a round trip.

        Data that waits in a queue on the way delays every other connection on it. A send then waits for room.
        Call it again from time to time: what the path carries is the kernel's estimate (TCP_INFO).
        """
        if self._socket.family == socket.AF_UNIX:
            return
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        carried_bytes = 0
        if len(info) == _TCP_INFO_BYTES:
            round_trip_us = struct.unpack_from("I", info, _MIN_RTT_AT)[0]
            rate_bytes_s = struct.unpack_from("Q", info, _DELIVERY_RATE_AT)[0]
            if round_trip_us < _UNKNOWN_RTT_US:
                carried_bytes = int(rate_bytes_s * round_trip_us / 1e6)
        # The kernel doubles the figure, for its own book-keeping.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, max(least_bytes, 2 * carried_bytes))

    # -- sending ------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Send one control frame. Waits while another thread is in the middle of a frame, which on a
        slow link takes a while: an event loop calls it by way of a worker thread.
        """
        encoded = wire.encode_message(message, self.version)
        with self.frame():
            self.write(encoded)

    def send_state(self, chunk: Bytes) -> None:
        """Send device state, cut into frames."""
        view = memoryview(chunk).cast("B")
        for start in range(0, len(view), wire.MAX_STATE_CHUNK_BYTES):
            part = view[start : start + wire.MAX_STATE_CHUNK_BYTES]
            with self.frame():
                self.write(wire.encode_state_header(len(part), self.version), more=True)
                self.write(part)

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Hold the sending side for one whole frame. What is written inside must be exactly that."""
        with self._sending:
            if self._failure is not None:
                raise HostLost(self._failure)
            try:
                yield
            except BaseException as error:
                # Whatever went wrong, the frame is incomplete: the stream cannot be used any more.
                self._fail(f"A frame to {self.peer} was cut off: {error}")
                raise

    def write(self, data: Bytes, more: bool = False) -> None:
        """Send bytes of the frame that is open; `more` tells the kernel that others follow at once."""
        view = memoryview(data).cast("B")
        flags = socket.MSG_MORE if more else 0
        while len(view):
            with self._failures_named():
                sent = self._socket.send(view, flags)
            self.sent_bytes += sent
            view = view[sent:]

    def write_at_once(self, data: bytes) -> None:
        """As `write`, for a few kilobytes that somebody waits for: without giving the interpreter's lock to
        another thread, as long as the socket has room.
        """
        sent = held.send(self._socket.fileno(), data, len(data), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        if sent < 0:
            sent = 0  # no room, or the connection has ended: `write` waits, or says so
        self.sent_bytes += sent
        if sent < len(data):
            self.write(memoryview(data)[sent:])

    def write_file(self, fd: int, offset_bytes: int, length_bytes: int) -> None:
        """Send a range of a file without copying it into this process."""
        end = offset_bytes + length_bytes
        while offset_bytes < end:
            with self._failures_named():
                sent = os.sendfile(self._socket.fileno(), fd, offset_bytes, end - offset_bytes)
            if sent == 0:
                raise HostLost(f"The RAM to be sent to {self.peer} ends before its size: it was truncated.")
            self.sent_bytes += sent
            offset_bytes += sent

    # -- receiving ----------------------------------------------------------------------------------

    def receive_header(self) -> Header:
        """Wait for the next frame. The caller must then receive its whole payload."""
        self.receive_into(self._header)
        return self.decoder.header(self._header)

    def receive_message(self, header: Header) -> Message:
        """Receive the body of a control frame."""
        body = bytearray(header.payload_bytes)
        self.receive_into(memoryview(body))
        return self.decoder.message(header, body)

    def receive_into(self, view: memoryview) -> None:
        """Fill a buffer of bytes.

        In pieces, so that `received_bytes` shows on a slow link, too, that the peer lives.
        """
        while len(view):
            with self._failures_named():
                received = self._socket.recv_into(view, min(len(view), _PIECE_BYTES), socket.MSG_WAITALL)
            if received == 0:
                raise self._ended()
            self.received_bytes += received
            view = view[received:]

    def receive_at_least(self, view: memoryview, least_bytes: int) -> int:
        """Receive what is there, and wait only until it is `least_bytes`; how much it was.

        Only where no more can be on its way than the view holds.
        """
        taken = 0
        while taken < least_bytes:
            with self._failures_named():
                received = self._socket.recv_into(view[taken:])
            if received == 0:
                raise self._ended()
            taken += received
        self.received_bytes += taken
        return taken

    def splice(self, pipe_fd: int, length_bytes: int) -> int:
        """Move received bytes into a pipe inside the kernel: at least one, at most `length_bytes`."""
        with self._failures_named():
            received = os.splice(self._socket.fileno(), pipe_fd, length_bytes)
        if received == 0:
            raise self._ended()
        self.received_bytes += received
        return received

    # -- the end ------------------------------------------------------------------------------------

    def shutdown(self, reason: str = "") -> None:
        """End the connection: blocked calls of all threads raise `HostLost`. Harmless when repeated."""
        self._fail(f"The connection to {self.peer} was closed here{': ' if reason else ''}{reason}.")

    def close(self) -> None:
        """End the connection and free the socket. Only when no other thread uses the channel any more."""
        self.shutdown()
        self._socket.close()

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            self._failure = reason
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # already disconnected

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise self._lost(f"{self.peer} has been silent for {self._silence_limit_s:g} s.") from None
        except OSError as error:
            raise self._lost(f"The connection to {self.peer} broke: {error}.") from None

    def _ended(self) -> HostLost:
        return self._lost(f"{self.peer} closed the connection.")

    def _lost(self, reason: str) -> HostLost:
        """The first reason is the one that counts: a shutdown here explains an error that follows it."""
        self._fail(reason)
        assert self._failure is not None
        return HostLost(self._failure)


def _set_up(sock: socket.socket, silence_limit_s: float) -> None:
    sock.setblocking(True)
    seconds = int(silence_limit_s)
    limit = struct.pack("ll", seconds, int((silence_limit_s - seconds) * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    if sock.family == socket.AF_UNIX:
        return
    # Buffers are left to the kernel, which fits them to the path better than any fixed size would.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_limit_s * 1000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
