"""Is what came after the resume what the source had? Compare the pages that nobody has written since.

The source's RAM stands still from the suspension until it is released, so it is the truth. The destination's
pager has kept account of every write since the guest's first instruction there; what was not written must be
equal. The destination hashes those pages a few at a time and looks afterwards which of them were written
meanwhile: those are left out and the others hashed again, so a hash always stands for pages that were not
written before it was made. The source hashes the same pages of its own.

Threads: the destination's half runs in a thread of its own; the source's in that which receives.
"""

from __future__ import annotations

from dataclasses import dataclass

from transhume.memory import runs as page_runs
from transhume.memory.digest import digest_of_runs, first_page_not_zero
from transhume.memory.pagemap import Scanner
from transhume.memory.ram import GuestBlock, GuestRam
from transhume.memory.runs import Runs
from transhume.migration import wire
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.wire import FrameType, Header
from transhume.model.vm import PAGE_BYTES

DIGEST_PAGES = 128
"""One hash stands for up to 512 KiB: so much is hashed again when a page of it is written meanwhile."""

_NAMED_PLACES = 5
"""How many places of a difference are named one by one."""


@dataclass(frozen=True)
class SentDigests:
    """Of all RAM: the pages that were hashed or named as empty, and those that had been written."""

    pages: int
    written_pages: int


def send_digests(channel: FrameChannel, ram: GuestRam, scanner: Scanner) -> SentDigests:
    """Hash every page that was not written since it was write-protected, and send the hashes.

    The VM may run meanwhile. Raises `HostLost` when the connection ends, `VmmError` when QEMU has ended,
    `KernelError` when writes are not tracked; begin anew then, on another connection.
    """
    pages = 0
    for index, block in enumerate(ram.blocks):
        written = scanner.get(block.address, block.block.size_bytes)
        unwritten = page_runs.complement(written, 0, block.page_count)
        there = page_runs.intersect(unwritten, block.populated_runs())
        for batch in page_runs.batches(page_runs.subtract(unwritten, there), 1 << 62, wire.MAX_RUNS):
            pages += _send_empty(channel, index, _still_unwritten(block, batch, scanner))
        for batch in page_runs.batches(there, DIGEST_PAGES, DIGEST_PAGES):
            pages += _send_digest(channel, index, block, batch, scanner)
    channel.send(wire.DigestsEnd(pages=pages))
    return SentDigests(pages, ram.page_count - pages)


def _send_empty(channel: FrameChannel, index: int, runs: Runs) -> int:
    # What was written meanwhile may have torn long runs into more than a frame takes.
    for part in page_runs.batches(runs, 1 << 62, wire.MAX_RUNS):
        with channel.frame():
            channel.write(wire.encode_table(FrameType.EMPTY, index, part, channel.version))
    return page_runs.page_count(runs)


def _send_digest(channel: FrameChannel, index: int, block: GuestBlock, runs: Runs, scanner: Scanner) -> int:
    while len(runs):
        digest = digest_of_runs(block, runs)
        hashed, runs = runs, _still_unwritten(block, runs, scanner)
        if page_runs.page_count(runs) == page_runs.page_count(hashed):
            with channel.frame():
                channel.write(wire.encode_digest(index, runs, digest, channel.version))
            break
    return page_runs.page_count(runs)


def _still_unwritten(block: GuestBlock, runs: Runs, scanner: Scanner) -> Runs:
    """Those of the pages that were not written. Look at their content before, never after."""
    first, end = int(runs[0, 0]), int(runs[-1].sum())
    written = scanner.get(block.address + first * PAGE_BYTES, (end - first) * PAGE_BYTES)
    return page_runs.subtract(runs, page_runs.shifted(written, first))


class Comparison:
    """The source's half, for the frames of one connection."""

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram
        self._pages = 0
        self._differing: list[str] = []

    def take(self, channel: FrameChannel, header: Header) -> None:
        """Receive one DIGEST or EMPTY frame and compare. Raises `HostLost` and `PeerProtocolError`."""
        payload = bytearray(header.payload_bytes)
        channel.receive_into(memoryview(payload))
        runs = channel.decoder.runs(header, payload[: header.table_bytes])
        block = self._ram.blocks[header.block_index]
        self._pages += page_runs.page_count(runs)
        if header.type is FrameType.EMPTY:
            page = first_page_not_zero(block, runs)
            if page is not None:
                self._differing.append(f"page {page} of {block.block.name} is empty there")
        elif digest_of_runs(block, runs) != payload[header.table_bytes :]:
            self._differing.append(_place(block, runs))

    def end(self) -> wire.Compared:
        """The answer to everything that was taken since the last one."""
        difference = "; ".join(self._differing[:_NAMED_PLACES])
        if len(self._differing) > _NAMED_PLACES:
            difference += f"; and in {len(self._differing) - _NAMED_PLACES} more places"
        compared = wire.Compared(pages=self._pages, difference=difference)
        self._pages, self._differing = 0, []
        return compared


def _place(block: GuestBlock, runs: Runs) -> str:
    first, last, count = int(runs[0, 0]), int(runs[-1].sum()) - 1, page_runs.page_count(runs)
    if count == 1:
        return f"page {first} of {block.block.name}"
    few = "" if count == last - first + 1 else f" ({count} of them were compared)"
    return f"pages {first} to {last} of {block.block.name}{few}"
