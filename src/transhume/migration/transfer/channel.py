"""One connection between two movers, in frames, over a blocking socket.

Threads: any thread may send, and a frame is never mixed with another's; one thread receives. Any thread
may call `shutdown`, which ends every blocked call of the others with `HostLost`.

Every failure of the connection is a `HostLost` that names the peer, and is final: after it nothing more
is sent, for half a frame may be on its way. Whoever is silent for `silence_limit_s` counts as lost: the
kernel watches for it on reads (SO_RCVTIMEO), writes (SO_SNDTIMEO) and data that is never acknowledged
(TCP_USER_TIMEOUT), so that no call polls.

Between hosts a channel is given a `Cipher`: then everything on the socket is TLS, and `demand_peer` makes the
handshake. A connection inside one machine needs none.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transhume.memory.syscalls import held
from transhume.migration import wire
from transhume.migration.wire import Bytes, Decoder, Header, Message
from transhume.model.errors import HostLost, TranshumeError, Unauthorized
from transhume.trust.cipher import Cipher
from transhume.trust.credentials import refusal

_KEEPALIVE_IDLE_S = 5
_KEEPALIVE_INTERVAL_S = 2
_KEEPALIVE_PROBES = 3

_PIECE_BYTES = 64 << 10

_CIPHER_BYTES = 128 << 10
"""What is encrypted at a time: much for one system call, little enough to stay in the cache."""

_TCP_INFO_BYTES = 168
_MIN_RTT_AT = 148
_DELIVERY_RATE_AT = 160
_UNKNOWN_RTT_US = 10_000_000
"""Where struct tcp_info (linux/tcp.h) has the least round trip and the rate of delivery."""


class FrameChannel:
    """Frames to and from one peer. Takes the connected socket over and sets it up.

    `peer` names the other end in messages. `decoder` says what it may send; the caller completes it
    (version, RAM blocks) as the connection is opened. `sent_bytes` and `received_bytes` count all frames that
    went over the wire, without what TLS adds, and `arrived_bytes` all that came, also of a record of TLS that
    is not whole yet: on a slow link it shows that the peer lives. Read them from any thread.
    """

    def __init__(
        self,
        sock: socket.socket,
        decoder: Decoder,
        peer: str,
        silence_limit_s: float,
        cipher: Cipher | None = None,
    ) -> None:
        self._cipher = cipher
        self._received = memoryview(bytearray(_CIPHER_BYTES)) if cipher is not None else memoryview(b"")
        self.decoder = decoder
        self.peer = peer
        self.sent_bytes = 0
        self.received_bytes = 0
        self.arrived_bytes = 0
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

    def demand_peer(self, host: str) -> None:
        """TLS's handshake, with `host` and nobody else at the other end. Call it first, once.

        Raises `Unauthorized`, `PeerProtocolError` or `HostLost`, all final.
        """
        cipher = self._cipher
        assert cipher is not None
        while True:
            try:
                done = cipher.handshake()
            except ssl.SSLError as error:
                self._tell_why(cipher)
                raise self._refused(error) from None
            self._send_all(cipher.take())
            if done:
                break
            self._receive_some(cipher)
        found = cipher.peer
        if found is None or found.host != host:
            who = f"host {found.host}" if found is not None else "somebody without a certificate"
            reason = f"{who} came where host {host} is due"
            self._fail(reason)
            raise Unauthorized(reason)

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
        if self._cipher is not None:
            self._write_encrypted(self._cipher, view, more)
            return
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
        encoded = data
        if self._cipher is not None:
            self._cipher.encrypt(memoryview(data))
            encoded = self._cipher.take()
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        sent = held.send(self._socket.fileno(), encoded, len(encoded), flags)
        # With no room, or when the connection has ended, what is left waits, or says so.
        self._send_all(encoded[max(0, sent) :])
        self.sent_bytes += len(data)

    def _write_encrypted(self, cipher: Cipher, view: memoryview, more: bool) -> None:
        for start in range(0, len(view), _CIPHER_BYTES):
            piece = view[start : start + _CIPHER_BYTES]
            cipher.encrypt(piece)
            if not more or start + _CIPHER_BYTES < len(view):
                self._send_all(cipher.take())
            self.sent_bytes += len(piece)

    def _send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            with self._failures_named():
                view = view[self._socket.send(view) :]

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
        if self._cipher is not None:
            while len(view):
                view = view[self._decrypt_some(self._cipher, view) :]
            return
        while len(view):
            with self._failures_named():
                received = self._socket.recv_into(view, min(len(view), _PIECE_BYTES), socket.MSG_WAITALL)
            if received == 0:
                raise self._ended()
            self._note_received(received)
            view = view[received:]

    def receive_at_least(self, view: memoryview, least_bytes: int) -> int:
        """Receive what is there, and wait only until it is `least_bytes`; how much it was.

        Only where no more can be on its way than the view holds.
        """
        taken = 0
        while taken < least_bytes:
            taken += self.receive_some(view[taken:])
        return taken

    def receive_some(self, view: memoryview) -> int:
        """Receive at least one byte into a buffer, at most what it holds."""
        if self._cipher is not None:
            return self._decrypt_some(self._cipher, view)
        with self._failures_named():
            received = self._socket.recv_into(view)
        if received == 0:
            raise self._ended()
        self._note_received(received)
        return received

    def _note_received(self, count: int) -> None:
        """Bytes as they came, without encryption."""
        self.received_bytes += count
        self.arrived_bytes += count

    def _decrypt_some(self, cipher: Cipher, view: memoryview) -> int:
        while True:
            try:
                count = cipher.decrypt_into(view)
            except ssl.SSLZeroReturnError:
                raise self._ended() from None
            except ssl.SSLError as error:
                self._tell_why(cipher)
                raise self._refused(error) from None
            if count:
                self.received_bytes += count
                return count
            self._receive_some(cipher)

    def _receive_some(self, cipher: Cipher) -> None:
        with self._failures_named():
            received = self._socket.recv_into(self._received)
        if received == 0:
            raise self._ended()
        self.arrived_bytes += received
        cipher.feed(self._received[:received])

    # -- the end ------------------------------------------------------------------------------------

    def shutdown(self, reason: str = "") -> None:
        """End the connection: blocked calls of all threads raise `HostLost`. Harmless when repeated."""
        self._fail(f"The connection to {self.peer} was closed here{': ' if reason else ''}{reason}.")

    def end_sending(self) -> None:
        """Let the peer see the end of what was sent. It may go on sending."""
        with self._failures_named():
            self._socket.shutdown(socket.SHUT_WR)

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

    def _tell_why(self, cipher: Cipher) -> None:
        """Send TLS's own word about an error, if it can be sent."""
        try:
            self._socket.send(cipher.take())
        except OSError:
            return  # nobody is there to hear it

    def _refused(self, error: ssl.SSLError) -> TranshumeError:
        """An error of TLS in words: as final as any other, and the first reason counts here too.

        A certificate can be refused until the peer has said something; later it is a connection that broke.
        """
        known = self._failure
        found = refusal(error, self.peer)
        if self.received_bytes:
            found = HostLost(found.message)
        self._fail(found.message)
        return found if known is None else HostLost(known)

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
