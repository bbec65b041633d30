"""The source's half of paging: what it owes goes on demand and by itself, and is counted.

Threads: `answer_faults` runs in that of the fault connection, `push` in the one that sends; the others may be
called from anywhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestRam
from transhume.memory.runs import Runs
from transhume.migration.paging.push import PushOrder
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.transfer.fault_server import serve_faults
from transhume.migration.transfer.pace import Pace
from transhume.migration.transfer.sender import PageSender
from transhume.model.vm import PAGE_BYTES

PUSH_PAGES = 128
"""The background push goes in steps of 512 KiB: after each it looks whether a fault has pointed elsewhere."""

LEAST_QUEUE_BYTES = 128 << 10
FIT_QUEUE_S = 0.2
"""While pages are pushed the socket's queue is kept short, fitted so often: faults share the path."""


class OwedPages:
    """Of one VM. `wire_bytes` went for them so far, on demand and by themselves."""

    def __init__(self) -> None:
        self.wire_bytes = 0
        self._order: PushOrder | None = None

    @property
    def left_pages(self) -> int | None:
        """How many were not sent yet; None as long as none were ever owed."""
        return None if self._order is None else self._order.left_pages

    def owe(self, block_pages: Sequence[int], layers: Sequence[Sequence[Runs]]) -> None:
        """These pages are owed, and no others; see `PushOrder`."""
        self._order = PushOrder(block_pages, layers)

    def owe_more(self, runs: Sequence[Runs]) -> None:
        """These too, if they are not owed already."""
        assert self._order is not None
        self._order.add(runs)

    def answer_faults(self, channel: FrameChannel, ram: GuestRam) -> None:
        """Send what vCPUs wait for until the connection ends; errors as `serve_faults`."""
        serve_faults(channel, ram, self._page_answered, self._pages_answered)

    def push(self, channel: FrameChannel, sender: PageSender, pace: Pace, stop: threading.Event) -> None:
        """Send everything that is owed, until that is done or `stop` is set. Raises `HostLost`."""
        order = self._order
        assert order is not None
        fitted_s = float("-inf")
        while True:
            while hold_s := order.hold_s(time.monotonic()):
                if stop.wait(hold_s):
                    return
            if time.monotonic() - fitted_s > FIT_QUEUE_S:
                fitted_s = time.monotonic()
                channel.keep_queue_short(LEAST_QUEUE_BYTES)
            piece = order.next(PUSH_PAGES)
            if piece is None:
                return
            sent = sender.send(*piece, pace)
            self.wire_bytes += sent.wire_bytes
            if not sent.complete:
                return

    def _page_answered(self, block_index: int, page: int) -> None:
        self.wire_bytes += PAGE_BYTES
        if self._order is not None:
            self._order.sent_page(block_index, page, time.monotonic())

    def _pages_answered(self, block_index: int, runs: Runs) -> None:
        self.wire_bytes += page_runs.page_count(runs) * PAGE_BYTES
        if self._order is not None:
            self._order.sent(block_index, runs)
            self._order.fault(block_index, int(runs[-1].sum()))
