"""The TLS of one connection without its socket: what is said goes in, what must be sent comes out.

The library allows one thread at a time in a connection, and a blocked read would keep every write waiting. So
TLS works here on memory, behind a lock that is never held while anybody waits for the network; who reads and
who writes the socket does that by itself.
"""

from __future__ import annotations

import ssl
import threading

from transhume.trust.credentials import ClientTls
from transhume.trust.names import Peer, peer_of


class Cipher:
    """One end of one connection. Any thread may call any method."""

    def __init__(self, tls: ClientTls | ssl.SSLContext) -> None:
        """`ClientTls` for the end that connected, a server's context for the one that was connected to."""
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        if isinstance(tls, ClientTls):
            self._tls = tls.context.wrap_bio(
                self._incoming, self._outgoing, server_hostname=tls.server_name or None
            )
        else:
            self._tls = tls.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._lock = threading.Lock()

    def handshake(self) -> bool:
        """One step: False when something must be received first. Take what is to be sent after each.

        Raises `ssl.SSLError`; then too, there is something to send: why.
        """
        with self._lock:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                return False
            return True

    @property
    def peer(self) -> Peer | None:
        """Who is at the other end. After the handshake."""
        return peer_of(self._tls)

    def encrypt(self, data: memoryview) -> None:
        """Add to what is to be sent."""
        with self._lock:
            while len(data):
                data = data[self._tls.write(data) :]

    def take(self) -> bytes:
        """What is to be sent, in the order in which it was said."""
        with self._lock:
            return self._outgoing.read()

    def feed(self, received: memoryview) -> None:
        """Give what came from the network."""
        with self._lock:
            self._incoming.write(received)

    def decrypt_into(self, view: memoryview) -> int:
        """Fill a buffer with what has come so far; how many bytes that were, 0 when more must be received.

        Raises `ssl.SSLError`: `ssl.SSLZeroReturnError` when the other end has said that it is done.
        """
        done = 0
        with self._lock:
            # To try with nothing there would end in an exception, which takes longer than to decrypt a page.
            while done < len(view) and (self._tls.pending() or self._incoming.pending):
                try:
                    done += self._tls.read(len(view) - done, view[done:])  # type: ignore[operator]
                except ssl.SSLWantReadError:
                    break
        return done
