"""A process uses memory that comes only while it does: it finds every page as it should be."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from tests.memory.processes import needs_tracking, wait_until
from tests.migration.paging.guest import (
    Guest,
    content,
    guest_process,
    marked,
    pages,
    source_ram,
    used,
)
from tests.migration.transfer.connection import ciphers, prove

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestRam
from transhume.memory.runs import Runs
from transhume.migration import wire
from transhume.migration.paging.missing import Condition
from transhume.migration.paging.push import PushOrder
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.transfer.fault_server import serve_faults
from transhume.migration.transfer.pager import Pager
from transhume.migration.transfer.receiver import PageReceiver
from transhume.migration.transfer.sender import PageSender
from transhume.migration.wire import Decoder, End
from transhume.model.errors import HostLost, KernelError, PeerProtocolError, TranshumeError
from transhume.model.vm import PAGE_BYTES

pytestmark = needs_tracking

BLOCK_PAGES = (600, 90)
SILENCE_S = 20.0


def owed_pages(block_pages: Sequence[int]) -> list[Runs]:
    """All pages that the source has: the holes are nobody's."""
    return [pages(*(page for page in range(count) if page % 5)) for count in block_pages]


class Threads:
    """Threads whose work ends before the test does, and whose failures are the test's."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self.failures: list[Exception] = []

    def start(self, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except (TranshumeError, AssertionError, OSError, ValueError) as error:
                self.failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)
        return thread

    def join(self) -> None:
        for each in self._threads:
            each.join(20)
            assert not each.is_alive()
        assert self.failures == []


class Link:
    """A main connection and one for faults, and the threads of both ends that use them."""

    def __init__(self, paging: Paging) -> None:
        self.fetched: list[tuple[int, int]] = []
        self.main, self._main_there = self._pair(paging.block_pages)
        self.fault, self._fault_there = self._pair(paging.block_pages)
        self._paging = paging
        self._stop = threading.Event()
        self._threads = [paging.threads.start(self._serve), paging.threads.start(self._receive)]

    @staticmethod
    def _pair(block_pages: Sequence[int]) -> tuple[FrameChannel, FrameChannel]:
        source, destination = socket.socketpair()
        for each in (source, destination):
            # Small buffers: a push that is ahead of its receiver would leave nothing to be fetched.
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        a, b = ciphers()
        made = (
            FrameChannel(source, Decoder(End.DESTINATION, block_pages), "host b", SILENCE_S, a),
            FrameChannel(destination, Decoder(End.SOURCE, block_pages), "host a", SILENCE_S, b),
        )
        prove(*made)
        return made

    def _serve(self) -> None:
        paging = self._paging

        def on_page(block: int, page: int) -> None:
            self.fetched.append((block, page))
            paging.order.sent_page(block, page, 0.0)

        def on_pages(block: int, runs: Runs) -> None:
            self.fetched.extend((block, page) for page in page_runs.pages_of(runs).tolist())
            paging.order.sent(block, runs)

        with contextlib.suppress(HostLost):
            serve_faults(self.fault, paging.source, on_page, on_pages)

    def _receive(self) -> None:
        receiver = PageReceiver(self._main_there, self._paging.guest.ram)
        receiver.pager = self._paging.pager
        with contextlib.suppress(HostLost):
            receiver.receive()

    def attach(self) -> None:
        self._paging.pager.attach(self._fault_there)

    def push(self, pieces: int | None = None, max_pages: int = 16) -> None:
        """In the order of the push, so many pieces or to the end."""
        sender = PageSender(self.main, self._paging.source, self._stop)
        left = pieces
        while left is None or left > 0:
            piece = self._paging.order.next(max_pages)
            if piece is None:
                return
            sender.send(*piece)
            left = left - 1 if left is not None else None

    def push_only(self, block: int, runs: Runs) -> None:
        PageSender(self.main, self._paging.source, self._stop).send(block, runs)

    def cut(self) -> None:
        for each in (self.main, self.fault, self._main_there, self._fault_there):
            each.shutdown("cut")

    def end(self) -> None:
        """As `cut`; nobody places a page that came on it any more."""
        self.cut()
        for each in self._threads:
            each.join(20)
            assert not each.is_alive()

    def close(self) -> None:
        for each in (self.main, self.fault, self._main_there, self._fault_there):
            each.close()


class Paging:
    """A guest process, the memory that it left behind, and whatever runs between them."""

    def __init__(self, guest: Guest, source: GuestRam, on_demand: bool, tracks_writes: bool) -> None:
        self.guest = guest
        self.tracks_writes = tracks_writes
        self.source = source
        self.block_pages = [each.page_count for each in source.blocks]
        self.owed = owed_pages(self.block_pages)
        self.order = PushOrder(self.block_pages, [self.owed])
        self.threads = Threads()
        self.links: list[Link] = []
        self.lost: list[TranshumeError] = []
        self.all_placed = threading.Event()
        self.placed_calls = 0
        self.on_demand = on_demand
        self.pager = self.make_pager()
        self.serving: threading.Thread | None = None

    def make_pager(self) -> Pager:
        return Pager(
            self.guest.uffd,
            self.guest.ram,
            self._note_all_placed,
            self.lost.append,
            self.on_demand,
            self.tracks_writes,
        )

    def _note_all_placed(self) -> None:
        self.placed_calls += 1
        self.all_placed.set()

    def arm(self) -> None:
        self.pager.arm(self.owed)
        self.serve()

    def serve(self) -> None:
        self.serving = self.threads.start(self.pager.serve_faults)

    def link(self) -> Link:
        """A new connection of each kind; the source learns what is missing, as from MISSING frames."""
        missing = [self.pager.missing.missing(index) for index in range(len(self.block_pages))]
        self.order = PushOrder(self.block_pages, [missing])
        link = Link(self)
        self.links.append(link)
        link.attach()
        return link

    def die(self) -> None:
        """This pager is no more, nor are its connections. What it knew is gone."""
        for each in self.links:
            each.end()
        self.pager.stop()
        assert self.serving is not None
        self.serving.join(20)
        self.pager = self.make_pager()
        self.pager.recover(self.owed)
        self.serve()

    def close(self) -> None:
        for each in self.links:
            each.cut()
        self.pager.stop()
        self.threads.join()
        self.guest.child.process.kill()
        for each in self.links:
            each.close()

    def assert_all_used(self) -> None:
        """Every page is what the guest and the source together made of it."""
        assert self.guest.child.hear() == "used 0"
        assert self.all_placed.wait(20)  # the guest has a page a moment before it is counted
        for block, count in enumerate(self.block_pages):
            for page in range(count):
                assert self.guest.in_memory(block, page) == used(block, page), (block, page)
        assert self.pager.missing.left_pages == 0
        assert self.placed_calls == 1
        assert self.guest.waiting() == (0, 0)

    def finish(self) -> None:
        assert self.all_placed.wait(20)
        self.pager.stop()
        assert self.serving is not None
        self.serving.join(20)
        self.pager.disarm()


@contextlib.contextmanager
def paging_of(
    block_pages: Sequence[int] = BLOCK_PAGES, on_demand: bool = True, tracks_writes: bool = False
) -> Iterator[Paging]:
    with guest_process(block_pages) as guest, source_ram(block_pages) as source:
        each = Paging(guest, source, on_demand, tracks_writes)
        try:
            yield each
        finally:
            each.close()


@pytest.fixture(params=[False, True], ids=["", "tracks-writes"])
def paging(request: pytest.FixtureRequest) -> Iterator[Paging]:
    with paging_of(tracks_writes=request.param) as each:
        yield each


def test_a_guest_that_runs_while_its_pages_come(paging: Paging) -> None:
    paging.arm()
    link = paging.link()
    paging.guest.child.say("use 1")
    link.push()
    paging.assert_all_used()
    paging.finish()
    report = paging.pager.report()
    assert report.owed_pages == sum(page_runs.page_count(runs) for runs in paging.owed)
    assert report.fetched_pages + report.pushed_pages == report.owed_pages
    holes = sum(-(-count // 5) for count in BLOCK_PAGES)
    assert report.zero_filled_pages == holes
    assert report.link_losses == 0
    assert sum(report.latency_us_histogram.values()) == report.faults


@pytest.mark.parametrize("on_demand", [True, False])
def test_on_demand_alone_or_by_the_push_alone(on_demand: bool) -> None:
    with paging_of((120, 30), on_demand) as paging:
        paging.arm()
        link = paging.link()
        paging.guest.child.say("use 2")
        if not on_demand:
            paging.guest.until_it_waits()
            link.push()
        paging.assert_all_used()
        paging.finish()
        assert (len(link.fetched) > 0) is on_demand
        report = paging.pager.report()
        owed = sum(page_runs.page_count(runs) for runs in paging.owed)
        assert (report.fetched_pages, report.pushed_pages) == ((owed, 0) if on_demand else (0, owed))


def test_what_an_earlier_pass_brought_of_owed_pages_is_dropped(paging: Paging) -> None:
    os.pwrite(paging.guest.ram.blocks[0].fd, b"stale".ljust(3 * PAGE_BYTES, b"!"), 11 * PAGE_BYTES)
    os.pwrite(paging.guest.ram.blocks[0].fd, b"still right", 15 * PAGE_BYTES)
    paging.arm()
    link = paging.link()
    paging.guest.read_later(0, 12)
    assert paging.guest.saw(content(0, 12))
    link.push()
    assert paging.all_placed.wait(20)
    assert paging.guest.in_memory(0, 11) == content(0, 11)
    assert paging.guest.in_memory(0, 15)[:11] == b"still right"


def test_what_the_guest_wrote_is_never_overwritten(paging: Paging) -> None:
    """Each page comes on demand, is written, and then is pushed although it has come."""
    paging.arm()
    link = paging.link()
    written = (1, 2, 7, 13, 599)
    for page in written:
        paging.guest.write_later(0, page)
        assert paging.guest.wrote()
    assert link.fetched == [(0, page) for page in written]
    link.push_only(0, page_runs.single(0, 600))
    link.push_only(0, page_runs.single(0, 600))
    link.push_only(1, page_runs.single(0, 90))
    assert paging.all_placed.wait(20)
    for page in range(600):
        expected = marked(content(0, page)) if page in written else content(0, page)
        assert paging.guest.in_memory(0, page) == expected
    wait_until(lambda: paging.pager.report().sent_twice_bytes >= 600 * PAGE_BYTES // 2)
    assert paging.placed_calls == 1


def test_holes_and_zero_pages_are_zeros(paging: Paging) -> None:
    paging.arm()
    for hole in (0, 5, 35):
        paging.guest.read_later(0, hole)  # nobody is connected, and nobody is needed
        assert paging.guest.saw(bytes(PAGE_BYTES))
    link = paging.link()
    paging.guest.read_later(0, 7)
    assert paging.guest.saw(bytes(PAGE_BYTES))
    assert link.fetched == [(0, 7)]
    link.push_only(0, pages(14, 21, 22))
    paging.guest.read_later(0, 22)
    assert paging.guest.saw(content(0, 22))
    assert paging.guest.in_memory(0, 21) == bytes(PAGE_BYTES)
    assert paging.pager.report().zero_filled_pages == 3


def test_who_waits_when_the_link_is_lost_is_served_by_the_next(paging: Paging) -> None:
    paging.arm()
    first = paging.link()
    first.push(pieces=4)
    first.cut()
    paging.guest.write_later(0, 334)
    paging.guest.until_it_waits()
    wait_until(lambda: len(paging.lost) == 1)
    assert isinstance(paging.lost[0], HostLost)
    assert paging.guest.in_memory(0, 334) == bytes(PAGE_BYTES)
    second = paging.link()
    assert paging.guest.wrote()
    assert second.fetched == [(0, 334)]
    assert paging.guest.in_memory(0, 334) == marked(content(0, 334))
    paging.guest.child.say("use 3")
    second.push()
    paging.assert_all_used()
    report = paging.pager.report()
    assert report.link_losses == 1
    assert report.link_lost_ms > 0
    assert 1 <= report.interrupted_faults < report.faults
    assert 0 < report.interrupted_ms < report.waited_ms
    assert sum(report.latency_us_histogram.values()) == report.faults - report.interrupted_faults


@pytest.mark.parametrize("seed", range(3))
def test_links_are_lost_and_pagers_die_while_the_guest_uses_its_memory(paging: Paging, seed: int) -> None:
    paging.arm()
    link = paging.link()
    paging.guest.child.say(f"use {seed}")
    for turn in range(3):
        with contextlib.suppress(HostLost):
            link.push(pieces=3, max_pages=8)
        if (turn + seed) % 2:
            paging.die()
        else:
            link.cut()
            paging.pager.lose_link()
        link = paging.link()
    link.push()
    paging.assert_all_used()
    paging.finish()


def test_a_successor_serves_who_waited_for_the_dead(paging: Paging) -> None:
    """The dead pager had read the fault: the kernel tells it to nobody again by itself."""
    paging.arm()
    paging.guest.write_later(0, 77)
    wait_until(lambda: paging.guest.waiting() == (0, 1))
    paging.die()
    link = paging.link()
    assert paging.guest.wrote()
    assert link.fetched == [(0, 77)]
    assert paging.guest.in_memory(0, 77) == marked(content(0, 77))


def test_a_successor_knows_what_was_placed(paging: Paging) -> None:
    paging.arm()
    link = paging.link()
    link.push_only(0, pages(6, 7, 8))
    for page in (8, 3):
        paging.guest.write_later(0, page)
        assert paging.guest.wrote()
    paging.guest.read_later(0, 5)  # a hole
    assert paging.guest.saw(bytes(PAGE_BYTES))
    paging.die()
    total = sum(page_runs.page_count(runs) for runs in paging.owed)
    assert paging.pager.missing.left_pages == total - 4
    assert paging.pager.missing.condition(0, 7) is Condition.FREE
    link = paging.link()
    link.push_only(0, page_runs.single(0, 600))
    link.push_only(1, page_runs.single(0, 90))
    assert paging.all_placed.wait(20)
    assert paging.guest.in_memory(0, 8) == marked(content(0, 8))
    assert paging.guest.in_memory(0, 3) == marked(content(0, 3))
    assert paging.guest.in_memory(0, 5) == bytes(PAGE_BYTES)


def test_a_successor_of_one_that_had_finished_has_nothing_to_do(paging: Paging) -> None:
    paging.arm()
    paging.link().push()
    assert paging.all_placed.wait(20)
    paging.die()
    assert paging.pager.missing.left_pages == 0
    assert paging.placed_calls == 1


def test_a_source_that_answers_with_another_page_is_a_broken_link(paging: Paging) -> None:
    """The guest goes on waiting, and gets the right page from the next connection."""
    paging.arm()
    ours, theirs = Link._pair(BLOCK_PAGES)
    try:
        paging.pager.attach(theirs)
        paging.guest.read_later(0, 11)
        header = ours.receive_header()
        table = bytearray(header.table_bytes)
        ours.receive_into(memoryview(table))
        assert ours.decoder.runs(header, table).tolist() == [[11, 1]]
        with ours.frame():
            ours.write(wire.encode_pages(0, pages(12), ours.version) + content(0, 12))
        wait_until(lambda: len(paging.lost) == 1)
        assert isinstance(paging.lost[0], PeerProtocolError)
        assert paging.guest.waiting() == (0, 1)
        paging.link()
        assert paging.guest.saw(content(0, 11))
    finally:
        ours.close()
        theirs.close()


def test_the_end_of_the_process_ends_a_placement(paging: Paging) -> None:
    paging.arm()
    paging.guest.child.process.kill()
    paging.guest.child.process.wait()
    with pytest.raises(TranshumeError, match="ended"):
        paging.pager.push(0, pages(1), bytearray(content(0, 1)))
    assert paging.pager.missing.condition(0, 1) is Condition.MISSING


def test_a_frame_that_is_no_answer_places_nothing(paging: Paging) -> None:
    paging.arm()
    ours, theirs = Link._pair(BLOCK_PAGES)
    paging.pager.attach(theirs)
    paging.guest.read_later(0, 11)
    header = ours.receive_header()
    ours.receive_into(memoryview(bytearray(header.table_bytes)))
    with ours.frame():
        ours.write(wire.encode_table(wire.FrameType.OWED, 0, pages(11), ours.version))
    wait_until(lambda: len(paging.lost) == 1)
    assert paging.pager.missing.condition(0, 11) is Condition.MISSING
    for channel in (ours, theirs):
        channel.close()


def test_a_first_touch_waits_for_memory(paging: Paging, monkeypatch: pytest.MonkeyPatch) -> None:
    paging.arm()
    fills = "copy" if paging.tracks_writes else "zero_fill"
    really: Callable[..., int] = getattr(paging.guest.uffd, fills)
    tries: list[int] = []

    def short_of_memory(address: int, *arguments: int, **others: bool) -> int:
        tries.append(address)
        if len(tries) == 1:
            raise KernelError("no memory left")
        return really(address, *arguments, **others)

    monkeypatch.setattr(paging.guest.uffd, fills, short_of_memory)
    paging.guest.read_later(0, 5)
    wait_until(lambda: len(tries) > 1)
    assert paging.threads.failures == []


def test_what_was_placed_before_a_failure_stays_placed(
    paging: Paging, monkeypatch: pytest.MonkeyPatch
) -> None:
    paging.arm()
    really = paging.guest.uffd.copy
    tries: list[int] = []

    def fails_in_the_middle(address: int, source_address: int, length_bytes: int, protected: bool) -> int:
        tries.append(address)
        if len(tries) == 2:
            paging.pager.stop()
            raise KernelError("no memory left")
        return really(address, source_address, length_bytes, protected)

    monkeypatch.setattr(paging.guest.uffd, "copy", fails_in_the_middle)
    with pytest.raises(KernelError):
        paging.pager.push(0, pages(1, 3, 6), bytearray(content(0, 1) + content(0, 3) + content(0, 6)))
    found = [paging.pager.missing.condition(0, page) for page in (1, 3, 6)]
    assert found == [Condition.PLACED, Condition.MISSING, Condition.MISSING]
