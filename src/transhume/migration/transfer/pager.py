"""The destination's pager: the VM runs, pages are missing, and each is placed once when it comes.

A page comes in answer to a fault, on the fault connection, or by itself, on the main one. Either way it is
placed with UFFDIO_COPY, atomically, and never over a page that is there: the guest may have written it.
A first touch of memory that the source never had is answered here, with zeros, and costs no traffic.

Where the memory is to be verified, everything is write-protected before the guest can reach it: what is there
already when the pager is armed, each page as it is placed. So the kernel knows every page that the guest has
written from its first instruction on, and keeps that for a successor too.

Threads: `serve_faults` runs in a thread of its own, `push` and `push_zeros` in that of the main connection;
`attach` and `stop` may be called from anywhere. QEMU keeps a userfaultfd of its own open, so whatever happens
to this process, a missing page is waited for and never read as zeros.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestBlock, GuestRam
from transhume.memory.runs import Runs
from transhume.memory.userfaultfd import REGISTER_MISSING, REGISTER_WP, Fault, Userfaultfd
from transhume.migration.paging.missing import Condition, MissingPages
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.wire import HEADER_BYTES, FrameType, encode_page_name, encode_table
from transhume.model.errors import HostLost, KernelError, PeerProtocolError, TranshumeError
from transhume.model.migration import PagingReport
from transhume.model.vm import PAGE_BYTES

_POLL_S = 0.1
_WAITING_POLL_S = 0.002
_UNREACHABLE_POLL_S = 0.02
_RETRY_S = 0.2
_BUFFER_PAGES = 256
_ONE_PAGE_BYTES = PAGE_BYTES + 8
_ONE_FRAME_BYTES = HEADER_BYTES + _ONE_PAGE_BYTES


class Pager:
    """Owns the missing pages of one VM at its destination.

    `on_all_placed` is called once, from whichever thread placed the last page, `on_link_lost` with the reason
    when the fault connection breaks. `on_demand` False never asks for a page: whoever waits, waits for the
    push. `tracks_writes` keeps account of the pages that the guest writes, in the kernel, which costs it a
    fault for the first write to each.
    """

    def __init__(
        self,
        uffd: Userfaultfd,
        ram: GuestRam,
        on_all_placed: Callable[[], None],
        on_link_lost: Callable[[TranshumeError], None],
        on_demand: bool = True,
        tracks_writes: bool = False,
    ) -> None:
        self.missing = MissingPages([each.page_count for each in ram.blocks])
        self._uffd = uffd
        self._ram = ram
        self._on_all_placed = on_all_placed
        self._on_link_lost = on_link_lost
        self._on_demand = on_demand
        self._tracks_writes = tracks_writes
        self._modes = REGISTER_MISSING | (REGISTER_WP if tracks_writes else 0)
        self._zeros = bytearray(_BUFFER_PAGES * PAGE_BYTES if tracks_writes else 0)
        self._stopping = threading.Event()
        self._channel: FrameChannel | None = None
        self._waiting: dict[tuple[int, int], float] = {}
        self._buffer = bytearray(_BUFFER_PAGES * PAGE_BYTES)
        self._buffer_view = memoryview(self._buffer)
        self._buffer_address = _address_of(self._buffer)
        self._latencies_s: list[float] = []
        self._interrupted_s: list[float] = []
        self._round_trips_s: list[float] = []
        self._owed_pages = 0
        self._fetched_pages = 0
        self._pushed_pages = 0
        self._restored_pages = 0
        self._zero_filled_pages = 0
        self._sent_twice_bytes = 0
        self._link_losses = 0
        self._link_lost_s = 0.0
        self._link_lost_since_s: float | None = None
        self._link_back_s = -math.inf
        self._verified_pages = 0
        self._written_pages = 0

    # --- before the VM runs ----------------------------------------------------------------------

    def arm(self, owed: Sequence[Runs]) -> None:
        """From its return on nobody reads or writes an owed page before it was placed.

        Whatever an earlier pass brought of these pages is dropped. Only while the VM does not run, and once.
        """
        for index, (block, runs) in enumerate(zip(self._ram.blocks, owed, strict=True)):
            for first, count in runs.tolist():
                block.punch(first, count)
            self.missing.owe(index, runs)
            self._owed_pages += page_runs.page_count(runs)
        for block in self._ram.blocks:
            self._uffd.register(block.address, block.block.size_bytes, self._modes)
            if self._tracks_writes:
                self._uffd.write_protect(block.address, block.block.size_bytes)

    def recover(self, owed: Sequence[Runs]) -> None:
        """Take over from a pager that died: what is in memory was placed, the rest of `owed` is missing.

        Nothing is protected again: the kernel has kept what the guest wrote since it runs here.
        Faults that the dead one had read are lost with it: everybody who waits is told to look again.
        """
        for index, (block, runs) in enumerate(zip(self._ram.blocks, owed, strict=True)):
            self.missing.owe(index, page_runs.subtract(runs, block.populated_runs()))
            self._owed_pages += page_runs.page_count(runs)
        for block in self._ram.blocks:
            self._uffd.register(block.address, block.block.size_bytes, self._modes)
            self._uffd.wake(block.address, block.block.size_bytes)

    def disarm(self) -> None:
        """Nothing is missing any more: let the kernel answer first touches by itself."""
        for block in self._ram.blocks:
            self._uffd.unregister(block.address, block.block.size_bytes)

    # --- connections -----------------------------------------------------------------------------

    def attach(self, channel: FrameChannel) -> None:
        """Ask for pages on this connection from now on; whoever waits already is asked for again."""
        if self._link_lost_since_s is not None:
            self._link_back_s = time.monotonic()
            self._link_lost_s += self._link_back_s - self._link_lost_since_s
            self._link_lost_since_s = None
        self._channel = channel

    def lose_link(self) -> None:
        """The source is gone for now."""
        self._channel = None
        if self._link_lost_since_s is None:
            self._link_lost_since_s = time.monotonic()
            self._link_losses += 1

    def _lost_for_s(self) -> float:
        since_s = self._link_lost_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def stop(self) -> None:
        """Let `serve_faults` return soon. Who waits for a page goes on waiting."""
        self._stopping.set()

    # --- faults ----------------------------------------------------------------------------------

    def serve_faults(self) -> None:
        """Answer faults until `stop`. Raises `VmmError` when QEMU has ended."""
        while not self._stopping.is_set():
            faults = self._uffd.read_faults(_WAITING_POLL_S if self._waiting else _POLL_S)
            now_s = time.monotonic()
            for fault in faults:
                self._take(fault, now_s)
            self._forget_placed()
            if self._waiting and self._on_demand:
                self._fetch_waiting()
            if self._waiting and self._channel is None:
                self._stopping.wait(_UNREACHABLE_POLL_S)

    def _take(self, fault: Fault, now_s: float) -> None:
        index, page = self._locate(fault.address)
        condition = self.missing.condition(index, page)
        if condition is Condition.MISSING:
            self._waiting.setdefault((index, page), now_s)
        elif condition is not Condition.PLACING:
            # Never owed, or given away by the guest since: zeros. If it is there by now, who waits is woken.
            address = _address(self._ram.blocks[index], page)
            # What the guest has given away since it came counts as written: the source has something else.
            place = self._place_zero_pages if condition is Condition.FREE else self._uffd.zero_fill
            try:
                self._zero_filled_pages += place(address, PAGE_BYTES) // PAGE_BYTES
            except KernelError:
                # No memory now: who waits is told to look again, and faults anew.
                self._stopping.wait(_RETRY_S)
                self._uffd.wake(address, PAGE_BYTES)

    def _locate(self, address: int) -> tuple[int, int]:
        for index, block in enumerate(self._ram.blocks):
            if 0 <= address - block.address < block.block.size_bytes:
                return index, (address - block.address) // PAGE_BYTES
        raise PeerProtocolError(f"a fault at {address:#x} is in no RAM block")

    def _fetch_waiting(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            if len(self._waiting) == 1:
                self._fetch_one(channel, *next(iter(self._waiting)))
            else:
                self._fetch_all(channel)
        except (HostLost, PeerProtocolError) as error:
            if self._channel is channel:
                self.lose_link()
                self._on_link_lost(error)
        self._forget_placed()

    def _fetch_all(self, channel: FrameChannel) -> None:
        wanted = [key for key in self._waiting if self.missing.condition(*key) is Condition.MISSING]
        for index in sorted({index for index, _ in wanted}):
            pages = np.array(sorted(page for at, page in wanted if at == index), dtype=np.int64)
            self._fetch(channel, index, page_runs.from_pages(pages))

    def _fetch_one(self, channel: FrameChannel, index: int, page: int) -> None:
        """The usual case, and the one that counts: one vCPU waits for one page."""
        asked_s = time.monotonic()
        with channel.frame():
            channel.write_at_once(encode_page_name(FrameType.FETCH, index, page, channel.version))
        # One frame is on its way, and no other: whatever comes is its.
        taken = channel.receive_at_least(self._buffer_view[:_ONE_FRAME_BYTES], HEADER_BYTES)
        header = channel.decoder.header(self._buffer_view[:HEADER_BYTES])
        expected = header.type in (FrameType.PAGES, FrameType.ZERO) and header.block_index == index
        if not expected or header.payload_bytes > _ONE_PAGE_BYTES:
            raise PeerProtocolError(f"{channel.peer} sent {header.type.name} where a page was due.")
        end = HEADER_BYTES + header.payload_bytes
        if taken > end:
            raise PeerProtocolError(f"{channel.peer} sent more than the page that was due.")
        channel.receive_into(self._buffer_view[taken:end])
        content = self._buffer_view[HEADER_BYTES:end]
        self._round_trips_s.append(time.monotonic() - asked_s)
        if channel.decoder.only_page(header, content) != page:
            raise PeerProtocolError(f"{channel.peer} sent another page than the one that was due.")
        if not self.missing.claim_page(index, page):
            self._sent_twice_bytes += header.payload_bytes
            return
        address = _address(self._ram.blocks[index], page)
        self._fetched_pages += 1
        if header.type is FrameType.PAGES:
            source = self._buffer_address + HEADER_BYTES + header.table_bytes
            self._insist(lambda: self._uffd.copy_page(address, source, self._tracks_writes), index, page)
        else:
            self._insist(lambda: self._place_zero_pages(address, PAGE_BYTES), index, page)
        left_pages = self.missing.settle_page(index, page)
        self._note_latency((index, page), time.monotonic())
        if left_pages == 0:
            self._on_all_placed()

    def _fetch(self, channel: FrameChannel, index: int, runs: Runs) -> None:
        with channel.frame():
            channel.write(encode_table(FrameType.FETCH, index, runs, channel.version))
        awaited = page_runs.page_count(runs)
        while awaited > 0:
            header = channel.receive_header()
            if header.type not in (FrameType.PAGES, FrameType.ZERO) or header.block_index != index:
                raise PeerProtocolError(f"{channel.peer} sent {header.type.name} where a page was due.")
            table = bytearray(header.table_bytes)
            channel.receive_into(memoryview(table))
            came = channel.decoder.runs(header, table)
            awaited -= page_runs.page_count(came)
            if header.type is FrameType.PAGES:
                self._receive(channel, index, came)
            else:
                self._place_zeros(index, came, pushed=False)

    def _receive(self, channel: FrameChannel, index: int, runs: Runs) -> None:
        for batch in page_runs.batches(runs, _BUFFER_PAGES, _BUFFER_PAGES):
            pages = page_runs.page_count(batch)
            channel.receive_into(self._buffer_view[: pages * PAGE_BYTES])
            self._place(index, batch, self._buffer_address, pushed=False)

    def _forget_placed(self) -> None:
        """Whose page has come waits no more; note how long it took."""
        now_s = time.monotonic()
        done = [
            key for key in self._waiting if self.missing.condition(*key) in (Condition.PLACED, Condition.FREE)
        ]
        for key in done:
            self._note_latency(key, now_s)

    def _note_latency(self, key: tuple[int, int], now_s: float) -> None:
        """What waited for a lost link says nothing of how faults are served: it is noted apart."""
        since_s = self._waiting.pop(key)
        interrupted = self._link_lost_since_s is not None or since_s < self._link_back_s
        (self._interrupted_s if interrupted else self._latencies_s).append(now_s - since_s)

    # --- pages that come -------------------------------------------------------------------------

    def push(self, block_index: int, runs: Runs, content: bytearray) -> None:
        """Place pages that came by themselves; `content` holds them in order."""
        self._place(block_index, runs, _address_of(content), pushed=True)

    def push_zeros(self, block_index: int, runs: Runs) -> None:
        """Place zero pages that were named by themselves."""
        self._place_zeros(block_index, runs, pushed=True)

    def restore(self, block_index: int, runs: Runs, content: bytearray | None) -> None:
        """Place pages out of a safe copy, those that have not come by now; without content they are zeros."""
        claimed = self.missing.claim(block_index, runs)
        self._restored_pages += page_runs.page_count(claimed)
        if content is None:
            self._place_claimed_zeros(block_index, claimed)
        else:
            self._place_claimed(block_index, runs, claimed, _address_of(content))

    def _count(self, claimed: Runs, pushed: bool) -> int:
        """Before they are settled: with the last page the report is taken."""
        pages = page_runs.page_count(claimed)
        if pushed:
            self._pushed_pages += pages
        else:
            self._fetched_pages += pages
        return pages

    def _place_zeros(self, block_index: int, runs: Runs, pushed: bool) -> None:
        claimed = self.missing.claim(block_index, runs)
        self._count(claimed, pushed)
        self._place_claimed_zeros(block_index, claimed)

    def _place_claimed_zeros(self, block_index: int, claimed: Runs) -> None:
        block = self._ram.blocks[block_index]
        self._carry_out(
            block_index,
            claimed,
            lambda first, count: self._place_zero_pages(_address(block, first), count * PAGE_BYTES),
        )

    def _place(self, block_index: int, runs: Runs, content_address: int, pushed: bool) -> None:
        claimed = self.missing.claim(block_index, runs)
        self._sent_twice_bytes += (page_runs.page_count(runs) - self._count(claimed, pushed)) * PAGE_BYTES
        self._place_claimed(block_index, runs, claimed, content_address)

    def _place_claimed(self, block_index: int, runs: Runs, claimed: Runs, content_address: int) -> None:
        block = self._ram.blocks[block_index]
        # Neighbours in the guest are neighbours in the content: a claimed run lies in it in one piece.
        offsets = np.searchsorted(page_runs.pages_of(runs), claimed[:, 0])
        source = dict(
            zip(claimed[:, 0].tolist(), (content_address + offsets * PAGE_BYTES).tolist(), strict=True)
        )
        self._carry_out(
            block_index,
            claimed,
            lambda first, count: self._place_pages(_address(block, first), source[first], count * PAGE_BYTES),
        )

    def _place_pages(self, address: int, source_address: int, length_bytes: int) -> int:
        return self._uffd.copy(address, source_address, length_bytes, self._tracks_writes)

    def _place_zero_pages(self, address: int, length_bytes: int) -> int:
        """The kernel's own zeros come without protection: a write between the two would not be noticed."""
        if not self._tracks_writes:
            return self._uffd.zero_fill(address, length_bytes)
        new = 0
        for done in range(0, length_bytes, len(self._zeros)):
            step_bytes = min(len(self._zeros), length_bytes - done)
            new += self._uffd.copy(address + done, _address_of(self._zeros), step_bytes, write_protected=True)
        return new

    def _carry_out(self, block_index: int, claimed: Runs, place: Callable[[int, int], int]) -> None:
        """Place claimed runs, one after the other."""
        for row, (first, count) in enumerate(claimed.tolist()):
            try:
                self._insist(partial(place, first, count), block_index, first, claimed)
            except TranshumeError:
                self.missing.settle(block_index, claimed[:row])
                raise
        if len(claimed) and self.missing.settle(block_index, claimed) == 0:
            self._on_all_placed()

    def _insist(
        self, place: Callable[[], int], block_index: int, first_page: int, claimed: Runs | None = None
    ) -> None:
        """Place a claimed run. A host without memory makes it wait, not fail: the VM has no other home.

        What cannot be placed because QEMU has ended is given back, with all that was claimed and comes after
        it.
        """
        while True:
            try:
                place()
            except TranshumeError as error:
                if isinstance(error, KernelError) and not self._stopping.wait(_RETRY_S):
                    continue
                rest = page_runs.single(first_page, 1)
                if claimed is not None:
                    rest = claimed[claimed[:, 0] >= first_page]
                self.missing.give_back(block_index, rest)
                raise
            return

    # --- what it was like ------------------------------------------------------------------------

    def note_verified(self, verified_pages: int, written_pages: int) -> None:
        """Nothing is missing, and so many pages that the guest has not written equal the source's."""
        self._verified_pages, self._written_pages = verified_pages, written_pages

    def report(self) -> PagingReport:
        """The figures so far."""
        latencies_us = np.array(self._latencies_s) * 1e6
        histogram: dict[int, int] = {}
        for exponent, count in zip(
            *np.unique(np.ceil(np.log2(np.maximum(latencies_us, 1.0))), return_counts=True), strict=True
        ):
            histogram[1 << int(exponent)] = int(count)
        some = len(latencies_us) > 0
        return PagingReport(
            owed_pages=self._owed_pages,
            faults=len(latencies_us) + len(self._interrupted_s),
            interrupted_faults=len(self._interrupted_s),
            interrupted_ms=sum(self._interrupted_s) * 1000,
            fetched_pages=self._fetched_pages,
            pushed_pages=self._pushed_pages,
            zero_filled_pages=self._zero_filled_pages,
            fault_p50_us=float(np.percentile(latencies_us, 50)) if some else 0.0,
            fault_p99_us=float(np.percentile(latencies_us, 99)) if some else 0.0,
            fault_max_us=float(latencies_us.max()) if some else 0.0,
            round_trip_p50_us=float(np.median(self._round_trips_s) * 1e6) if self._round_trips_s else 0.0,
            latency_us_histogram=histogram,
            waited_ms=float(latencies_us.sum() / 1000) + sum(self._interrupted_s) * 1000,
            sent_twice_bytes=self._sent_twice_bytes,
            restored_pages=self._restored_pages,
            link_losses=self._link_losses,
            link_lost_ms=(self._link_lost_s + self._lost_for_s()) * 1000,
            verified_pages=self._verified_pages,
            written_pages=self._written_pages,
        )


def _address(block: GuestBlock, first_page: int) -> int:
    return block.address + first_page * PAGE_BYTES


def _address_of(buffer: bytearray) -> int:
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))
