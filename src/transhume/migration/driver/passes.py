"""What the source sends of the memory until the device state has left: passes, last pages, names of the rest.

Everything here runs in the mover's data thread, one call after the other; `interrupt` may be set from
anywhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from transhume.memory import runs as page_runs
from transhume.memory.digest import digest
from transhume.memory.ram import GuestRam
from transhume.memory.runs import Runs
from transhume.memory.tracker import DirtyTracker
from transhume.migration import wire
from transhume.migration.driver.dirty_probe import DirtyProbe
from transhume.migration.driver.owed_file import OwedFile
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.transfer.owed_pages import OwedPages
from transhume.migration.transfer.pace import Pace
from transhume.migration.transfer.sender import PageSender, SentPages
from transhume.model.errors import HostLost

SLICE_PAGES = 2048
"""A pass goes in slices of 8 MiB, so that an interrupted one knows what is left."""


class Passes:
    """Of one VM, over one connection.

    `left` is what the next pass has to send, `latest` what the last scan found, and `owed` what was left for
    after the resume, each block by block.
    """

    def __init__(
        self,
        channel: FrameChannel,
        ram: GuestRam,
        tracker: DirtyTracker,
        pace: Pace,
        stop: threading.Event,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.left: list[Runs] = []
        self.latest: list[Runs] = []
        self.owed: list[Runs] = []
        self.interrupt = threading.Event()
        self._channel = channel
        self._ram = ram
        self._tracker = tracker
        self._pace = pace
        self._stop = stop
        self._sender = PageSender(channel, ram, stop, on_progress)

    def send(self, runs: Sequence[Runs], probe: DirtyProbe | None) -> tuple[SentPages, list[Runs]]:
        """One pass: send the runs of each block; what an interruption left comes back. Who asks for the pass
        clears `interrupt` before.

        A probe scans, and so clears marks: `scan` adds what it found. Raises `HostLost`.
        """
        sent = SentPages()
        unsent = [page_runs.empty() for _ in runs]
        for index, block_runs in enumerate(runs):
            slices = list(page_runs.batches(block_runs, SLICE_PAGES, SLICE_PAGES))
            for number, piece in enumerate(slices):
                if self.interrupt.is_set():
                    unsent[index] = _join(slices[number:])
                    break
                if probe is not None and probe.take(time.monotonic(), sent.wire_bytes):
                    self.interrupt.set()
                sent += self._send_slice(index, self._with_newest(index, piece), self._pace)
        return sent, unsent

    def scan(self, unsent: Sequence[Runs], probe: DirtyProbe | None) -> None:
        """End a pass: find what was written since its pages were read."""
        dirty = self._tracker.collect()
        if probe is not None and probe.found:
            dirty = _union(dirty, probe.found)
        self.latest, self.left = dirty, _union(dirty, unsent)

    def send_rest(self, verify: bool) -> tuple[SentPages, float]:
        """The VM is paused, so this scan is the last: send all that is left. Also the time of the last
        page.
        """
        sent = self._send_now(_union(self._tracker.collect(), self.left))
        last_page_s = time.monotonic()
        self._end_last_pages(sent, verify)
        return sent, last_page_s

    def name_owed(
        self, owed_pages: OwedPages, owed_file: OwedFile, budget_pages: int, first: bool, verify: bool
    ) -> tuple[int, SentPages]:
        """The VM is paused, so this scan is the last: name what is left as owed.

        A few of the pages written last are sent, as many as the promised downtime has room for. How many the
        others are, and what was sent, comes back. `first`: no pass was made, so all that was ever touched is
        owed. With nothing owed after all, `verify` compares everything now.
        """
        dirty = self._tracker.collect()
        rest = self._ram.populated_runs() if first else self.left
        now = _first_pages(dirty, budget_pages)
        sent = self._send_now(now)
        dirty, rest = _without(dirty, now), _without(rest, now)
        owed = _union(dirty, rest)
        count = page_count(owed)
        if count:
            self.owed = owed
            owed_file.write(owed)
            owed_pages.owe(self._channel.decoder.block_pages, [dirty, self.latest, rest])
            self._send_names(owed)
        self._end_last_pages(sent, verify and count == 0)
        return count, sent

    def end_state(self, rest: bytes, end: wire.StateEnd, owed_pages: OwedPages, owed_file: OwedFile) -> None:
        """QEMU is done with its state, and nothing may have been written since the last scan.

        Were a device to write guest RAM while it saves its state, that page would be lost without a sign: so
        it is looked for, and sent or named, before the end mark that lets the destination commit.
        """
        self._channel.send_state(rest)
        late = self._tracker.collect()
        if page_count(late) and self.owed:
            owed_pages.owe_more(late)
            self.owed = _union(self.owed, late)
            owed_file.write(self.owed)  # a successor's safe copy must hold them too
            self._send_names(late)
            self._channel.send(wire.LastPagesEnd(pages=0, zero_pages=0))
        elif page_count(late):
            sent = self._send_now(late)
            self._channel.send(wire.LastPagesEnd(pages=sent.pages, zero_pages=sent.zero_pages))
        self._channel.send(end)

    def _send_now(self, runs: Sequence[Runs]) -> SentPages:
        """While the VM is paused: without a pace, and nothing new can have been written."""
        sent = SentPages()
        for index, block_runs in enumerate(runs):
            for piece in page_runs.batches(block_runs, SLICE_PAGES, SLICE_PAGES):
                sent += self._send_slice(index, piece, None)
        return sent

    def _send_slice(self, index: int, piece: Runs, pace: Pace | None) -> SentPages:
        sent = self._sender.send(index, piece, pace)
        if self._stop.is_set():
            raise HostLost("the pass was given up")
        return sent

    def _with_newest(self, index: int, piece: Runs) -> Runs:
        """Take what was written in the piece's range since the last scan along, and clear its marks.

        A page that was written before its turn came is so sent once and not again in the next pass (the idea
        is Chunguang Li's, for QEMU in 2016). The scan comes before the pages are read, as always.
        """
        first = int(piece[0, 0])
        end = int(piece[-1].sum())
        return page_runs.union(piece, self._tracker.collect_range(index, first, end - first))

    def _end_last_pages(self, sent: SentPages, verify: bool) -> None:
        digests = tuple(digest(block) for block in self._ram.blocks) if verify else ()
        self._channel.send(wire.LastPagesEnd(pages=sent.pages, zero_pages=sent.zero_pages, digests=digests))

    def _send_names(self, owed: Sequence[Runs]) -> None:
        for index, runs in enumerate(owed):
            for batch in page_runs.batches(runs, 1 << 62, wire.MAX_RUNS):
                with self._channel.frame():
                    self._channel.write(
                        wire.encode_table(wire.FrameType.OWED, index, batch, self._channel.version)
                    )


def page_count(runs: Sequence[Runs]) -> int:
    """The pages of all blocks together."""
    return sum(page_runs.page_count(each) for each in runs)


def _union(left: Sequence[Runs], right: Sequence[Runs]) -> list[Runs]:
    return [page_runs.union(*pair) for pair in zip(left, right, strict=True)]


def _without(runs: Sequence[Runs], others: Sequence[Runs]) -> list[Runs]:
    return [page_runs.subtract(*pair) for pair in zip(runs, others, strict=True)]


def _first_pages(runs: Sequence[Runs], most_pages: int) -> list[Runs]:
    """Up to so many pages of all blocks together."""
    first: list[Runs] = []
    for block in runs:
        piece = next(page_runs.batches(block, most_pages, len(block)), None) if most_pages > 0 else None
        first.append(page_runs.empty() if piece is None else piece)
        most_pages -= page_runs.page_count(first[-1])
    return first


def _join(pieces: Sequence[Runs]) -> Runs:
    joined = page_runs.empty()
    for piece in pieces:
        joined = page_runs.union(joined, piece)
    return joined
