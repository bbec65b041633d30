"""Receive pages into guest RAM.

Threads: a `PageReceiver` is the one receiver of its channel and belongs to one thread at a time.
"""

from __future__ import annotations

from transhume.memory.ram import GuestRam
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.wire import Message


class PageReceiver:
    """Takes PAGES and ZERO frames off a channel into RAM, and hands everything else to its caller.

    `pages` and `zero_pages` count what came since the last `take_counts`.
    """

    def __init__(self, channel: FrameChannel, ram: GuestRam) -> None:
        self._channel = channel
        self._ram = ram
        self.pages = 0
        self.zero_pages = 0

    def receive(self) -> Message | bytes:
        """Place pages until a frame of another kind comes: a message, or a chunk of device state.

        Everything sent before that frame is in RAM when this returns. Blocks; raises `HostLost` when the
        connection fails or the peer is silent too long, `PeerProtocolError` when it breaks the protocol,
        `KernelError` when the host has no memory for a page.
        """
        raise NotImplementedError

    def take_counts(self) -> tuple[int, int]:
        """Pages and zero pages received since the last call; compare them with the sender's totals."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what the receiver holds; the channel and the RAM stay open."""
        raise NotImplementedError
