"""Send pages of guest RAM.

Long runs go straight from the memfd to the socket (sendfile), after a look at their content through a
short-lived mapping: zero pages are named, not sent, and holes are not even touched. Short runs, where a
system call for each would cost more than the copy, are gathered into a buffer and sent in one piece.

The caller has scanned for dirty pages before: what the guest writes while its pages are on their way
is in the next scan, so that a page torn by such a write is sent again (see memory/tracker.py).

Threads: one `PageSender` belongs to one thread at a time; its progress callback runs in that thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from transhume.memory.ram import GuestRam
from transhume.memory.runs import Runs
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.transfer.pace import Pace
from transhume.model.vm import PAGE_BYTES

BATCH_PAGES = 512
_LEAST_BATCH_PAGES = 16
_BATCH_RUNS = 512
_LONG_RUN_PAGES = 16
_SLOW_BATCH_S = 0.04
_FAST_BATCH_S = 0.01
_REPORT_INTERVAL_S = 0.05


@dataclass(frozen=True)
class SentPages:
    """What one call sent: pages in full, pages named as zero, bytes on the wire with all headers.

    `complete` is false when the stop flag ended it early; the counts then cover what was sent.
    """

    pages: int = 0
    zero_pages: int = 0
    wire_bytes: int = 0
    complete: bool = True

    def __add__(self, other: SentPages) -> SentPages:
        return SentPages(
            self.pages + other.pages,
            self.zero_pages + other.zero_pages,
            self.wire_bytes + other.wire_bytes,
            self.complete and other.complete,
        )


class PageSender:
    """Sends runs of pages over a channel.

    `stop` is looked at between batches, which last about 40 ms at most however slow the link is.
    `on_progress(pages, wire_bytes)` is told the increments (zero pages count as pages) at most every 50 ms.
    """

    def __init__(
        self,
        channel: FrameChannel,
        ram: GuestRam,
        stop: threading.Event,
        on_progress: Callable[[int, int], None] = lambda pages, wire_bytes: None,
    ) -> None:
        self._channel = channel
        self._ram = ram
        self._stop = stop
        self._on_progress = on_progress
        self._batch_pages = BATCH_PAGES
        self._buffer = memoryview(bytearray(BATCH_PAGES * PAGE_BYTES))
        self._unreported_pages = 0
        self._unreported_bytes = 0
        self._reported_at_s = 0.0

    def send(self, block_index: int, runs: Runs, pace: Pace | None = None) -> SentPages:
        """Send these pages of a RAM block, each at least once and with content read from now on.

        Blocks; call it from a worker thread. Raises `HostLost` when the connection fails.
        """
        raise NotImplementedError
