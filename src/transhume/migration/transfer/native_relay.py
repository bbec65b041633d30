"""QEMU's own engine over TLS: QEMU gets one end of a socket pair, and here both ways are carried over.

QEMU speaks no TLS of ours, so its stream passes through the mover: encrypted at the source, decrypted at the
destination. The end of either side is passed on, so that QEMU notices as it would on a connection of its own.
"""

from __future__ import annotations

import contextlib
import socket
import threading

from transhume.migration.transfer.channel import FrameChannel
from transhume.model.errors import HostLost, PeerProtocolError, Refused

_PIECE_BYTES = 256 << 10


class NativeRelay:
    """Carries one connection. Takes the channel over, which must have no frames any more.

    Two threads: one for what QEMU says, one for what it hears. They end when both sides have ended, or with
    `shutdown`, which any thread may call.
    """

    def __init__(self, channel: FrameChannel) -> None:
        self._channel = channel
        self._ours, self._qemus = socket.socketpair()
        channel.wait_for_ever()  # a direction may be silent for as long as the migration takes
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("relay from QEMU", self._from_qemu), ("relay to QEMU", self._to_qemu))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def qemu_end(self) -> int:
        """The descriptor to be lent to QEMU."""
        return self._qemus.fileno()

    def release(self) -> None:
        """QEMU has its duplicate: only when no other is left, its end of the connection can be noticed."""
        self._qemus.close()

    def shutdown(self) -> None:
        """End both sides. Harmless when repeated."""
        self._channel.shutdown()
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End both sides and wait for the threads."""
        self.shutdown()
        for thread in self._threads:
            thread.join()
        self._channel.close()
        self._ours.close()
        self._qemus.close()

    def _from_qemu(self) -> None:
        piece = memoryview(bytearray(_PIECE_BYTES))
        try:
            while count := self._ours.recv_into(piece):
                self._channel.write(piece[:count])
            self._channel.end_sending()
        except (OSError, HostLost):
            self.shutdown()

    def _to_qemu(self) -> None:
        piece = memoryview(bytearray(_PIECE_BYTES))
        try:
            while True:
                count = self._channel.receive_some(piece)
                self._ours.sendall(piece[:count])
        except OSError:
            self.shutdown()
        except (HostLost, PeerProtocolError, Refused):
            # What came before the end is with QEMU; it may still have something to say.
            with contextlib.suppress(OSError):
                self._ours.shutdown(socket.SHUT_WR)
