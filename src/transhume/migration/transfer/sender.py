"""Send pages of guest RAM.

Every page is copied into a small buffer first, to see whether it is all zeros: such pages are named, not
sent. (Reading does not allocate holes, and costs less than the page faults of a mapping.) From that buffer
they go out in one piece: TLS encrypts them there, so the kernel could not take them from the memfd by itself.

The caller has scanned for dirty pages before: what the guest writes while its pages are on their way
is in the next scan, so that a page torn by such a write is sent again (see memory/tracker.py).

Threads: one `PageSender` belongs to one thread at a time; its progress callback runs in that thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestBlock, GuestRam
from transhume.memory.runs import Runs
from transhume.memory.zero import read_divided
from transhume.migration import wire
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.transfer.pace import Pace
from transhume.model.vm import PAGE_BYTES

BATCH_PAGES = 256
_LEAST_BATCH_PAGES = 16
_BATCH_RUNS = 512
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
    `on_progress(pages, wire_bytes)` is told the increments (zero pages count as pages) every 50 ms and at
    the end of each call.
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
        block = self._ram.blocks[block_index]
        sent = self._send_batches(block, runs, pace)
        self._report(time.monotonic(), at_once=True)
        return sent

    def _send_batches(self, block: GuestBlock, runs: Runs, pace: Pace | None) -> SentPages:
        sent = SentPages()
        for batch in page_runs.batches(runs, lambda: self._step_pages(pace), _BATCH_RUNS):
            if self._stop.is_set():
                return sent + SentPages(complete=False)
            begun_s = time.monotonic()
            step = self._send_pages(block, batch)
            now_s = time.monotonic()
            sent += step
            self._fit_batch(now_s - begun_s)
            self._account(now_s, step)
            delay_s = pace.delay_s(now_s, step.wire_bytes) if pace is not None else 0.0
            if delay_s > 0:
                self._stop.wait(delay_s)
        return sent

    def _step_pages(self, pace: Pace | None) -> int:
        if pace is None:
            return self._batch_pages
        return max(1, min(self._batch_pages, pace.step_bytes(BATCH_PAGES * PAGE_BYTES) // PAGE_BYTES))

    def _fit_batch(self, duration_s: float) -> None:
        """Keep a batch short on a slow link, for the stop flag's sake, and large on a fast one."""
        if duration_s > _SLOW_BATCH_S:
            self._batch_pages = max(_LEAST_BATCH_PAGES, self._batch_pages // 2)
        elif duration_s < _FAST_BATCH_S:
            self._batch_pages = min(BATCH_PAGES, self._batch_pages * 2)

    def _send_pages(self, block: GuestBlock, runs: Runs) -> SentPages:
        zeros, data, content = read_divided(block, runs, self._buffer)
        sent = self._send_zeros(block, zeros)
        if len(data) == 0:
            return sent
        begin = wire.encode_pages(block.block.index, data, self._channel.version)
        with self._channel.frame():
            self._channel.write(begin, more=True)
            self._channel.write(content.data)
        return sent + _counted(data, len(begin))

    def _send_zeros(self, block: GuestBlock, runs: Runs) -> SentPages:
        if len(runs) == 0:
            return SentPages()
        frame = wire.encode_zero(block.block.index, runs, self._channel.version)
        with self._channel.frame():
            self._channel.write(frame)
        return SentPages(zero_pages=page_runs.page_count(runs), wire_bytes=len(frame))

    def _account(self, now_s: float, step: SentPages) -> None:
        self._unreported_pages += step.pages + step.zero_pages
        self._unreported_bytes += step.wire_bytes
        self._report(now_s)

    def _report(self, now_s: float, at_once: bool = False) -> None:
        if self._unreported_bytes == 0 or not (at_once or now_s - self._reported_at_s >= _REPORT_INTERVAL_S):
            return
        pages, wire_bytes = self._unreported_pages, self._unreported_bytes
        self._unreported_pages = self._unreported_bytes = 0
        self._reported_at_s = now_s
        self._on_progress(pages, wire_bytes)


def _counted(data: Runs, begin_bytes: int) -> SentPages:
    """What one PAGES frame amounts to."""
    pages = page_runs.page_count(data)
    return SentPages(pages=pages, wire_bytes=begin_bytes + pages * PAGE_BYTES)
