"""Pages sent by one mover are the pages that the other one has, byte for byte."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.memory.processes import make_memfd, wait_until
from tests.migration.transfer.connection import connected

from transhume.memory import runs as page_runs
from transhume.memory.digest import digest
from transhume.memory.ram import GuestRam
from transhume.memory.runs import Runs
from transhume.migration import wire
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.transfer.pace import Pace
from transhume.migration.transfer.receiver import PageReceiver
from transhume.migration.transfer.sender import PageSender, SentPages
from transhume.model.errors import HostLost, KernelError, PeerProtocolError
from transhume.model.vm import PAGE_BYTES


@dataclass
class Transfer:
    """Both ends of a migration's data path, with RAM of their own."""

    source: GuestRam
    destination: GuestRam
    at_source: FrameChannel
    at_destination: FrameChannel
    sender: PageSender
    receiver: PageReceiver
    stop: threading.Event
    pool: ThreadPoolExecutor
    progress: list[tuple[int, int]]

    def write(self, block: int, page: int, content: bytes) -> None:
        os.pwrite(self.source.blocks[block].fd, content.ljust(PAGE_BYTES, b"\0"), page * PAGE_BYTES)

    def fill(self, block: int, first_page: int, count: int, seed: int = 0) -> None:
        content = np.random.default_rng(seed).integers(1, 255, count * PAGE_BYTES, dtype=np.uint8)
        os.pwrite(self.source.blocks[block].fd, content.tobytes(), first_page * PAGE_BYTES)

    def one_pass(self, per_block: list[Runs], pace: Pace | None = None) -> SentPages:
        """Send, end the pass, and check that the other end counts the same."""
        received: Future[wire.Message | bytes] = self.pool.submit(self.receiver.receive)
        before = self.at_source.sent_bytes
        sent = SentPages()
        for index, runs in enumerate(per_block):
            sent += self.sender.send(index, runs, pace)
        assert self.at_source.sent_bytes - before == sent.wire_bytes
        end = wire.PassEnd(iteration=0, pages=sent.pages, zero_pages=sent.zero_pages)
        self.at_source.send(end)
        assert received.result(20) == end
        assert self.receiver.take_counts() == (sent.pages, sent.zero_pages)
        assert self.receiver.take_counts() == (0, 0)
        return sent

    def assert_equal(self) -> None:
        for left, right in zip(self.source.blocks, self.destination.blocks, strict=True):
            size = left.block.size_bytes
            assert os.pread(left.fd, size, 0) == os.pread(right.fd, size, 0)
            assert digest(left) == digest(right)


@contextlib.contextmanager
def transfer(
    *page_counts: int, buffer_bytes: int | None = None, silence_limit_s: float = 10.0
) -> Iterator[Transfer]:
    with contextlib.ExitStack() as stack:
        rams = []
        for _ in range(2):
            fds = [make_memfd(pages * PAGE_BYTES, index) for index, pages in enumerate(page_counts)]
            rams.append(GuestRam.of_fds(fds))
            stack.callback(rams[-1].close)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        channels = stack.enter_context(connected(page_counts, silence_limit_s, buffer_bytes))
        receiver = PageReceiver(channels[1], rams[1])
        stop = threading.Event()
        progress: list[tuple[int, int]] = []
        sender = PageSender(
            channels[0], rams[0], stop, lambda pages, wire_bytes: progress.append((pages, wire_bytes))
        )
        yield Transfer(rams[0], rams[1], *channels, sender, receiver, stop, pool, progress)


def test_all_kinds_of_pages_arrive() -> None:
    with transfer(3000, 40) as both:
        both.fill(0, 0, 1000, seed=1)
        both.fill(0, 1500, 7, seed=2)
        for page in range(2000, 2300, 2):
            both.write(0, page, page.to_bytes(2, "little"))
        for page in range(100, 900, 3):
            both.write(0, page, b"")
        both.fill(1, 39, 1, seed=3)
        sent = both.one_pass(both.source.populated_runs())
        assert sent.zero_pages == len(range(100, 900, 3))
        assert sent.pages == 1000 + 7 + 150 + 1 - sent.zero_pages
        both.assert_equal()
        assert sum(pages for pages, _ in both.progress) == sent.pages + sent.zero_pages
        assert sum(wire_bytes for _, wire_bytes in both.progress) == sent.wire_bytes


def test_what_was_data_and_is_zero_now_is_emptied_at_the_destination() -> None:
    with transfer(100) as both:
        both.fill(0, 0, 100)
        both.one_pass(both.source.populated_runs())
        both.source.blocks[0].punch(10, 5)
        both.write(0, 50, b"")
        dirty = np.array([[10, 5], [50, 1]], dtype=np.int64)
        sent = both.one_pass([dirty])
        assert (sent.pages, sent.zero_pages) == (0, 6)
        assert both.destination.blocks[0].populated_runs().tolist() == [[0, 10], [15, 35], [51, 49]]
        both.assert_equal()


def test_nothing_is_allocated_by_looking() -> None:
    """Holes stay holes at the source, and pages of zeros become holes at the destination."""
    with transfer(1000) as both:
        both.fill(0, 400, 20)
        sent = both.one_pass([page_runs.single(0, 1000)])
        assert (sent.pages, sent.zero_pages) == (20, 980)
        assert both.source.blocks[0].populated_runs().tolist() == [[400, 20]]
        assert both.destination.blocks[0].populated_runs().tolist() == [[400, 20]]
        both.assert_equal()


changes = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.integers(0, 299),
        st.integers(1, 60),
        st.sampled_from(["data", "zero", "punch", "ends"]),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(changes, min_size=1, max_size=4))
def test_after_every_pass_both_are_equal(passes: list[list[tuple[int, int, int, str]]]) -> None:
    page_counts = (300, 300)
    with transfer(*page_counts) as both:
        for number, steps in enumerate(passes):
            dirty = [np.zeros(pages, dtype=np.bool_) for pages in page_counts]
            for block, first, count, kind in steps:
                count = min(count, 300 - first)
                dirty[block][first : first + count] = True
                if kind == "data":
                    both.fill(block, first, count, seed=number)
                elif kind == "punch":
                    both.source.blocks[block].punch(first, count)
                else:
                    mark = b"" if kind == "zero" else bytes(PAGE_BYTES - 1) + b"\1"
                    for page in range(first, first + count):
                        both.write(block, page, mark)
            both.one_pass([page_runs.from_bitmap(each) for each in dirty])
            both.assert_equal()


def test_a_guest_that_writes_all_the_time() -> None:
    """What was written during a pass goes in the last one; then both are equal."""
    pages = 2000
    with transfer(pages) as both:
        both.fill(0, 0, pages)
        done = threading.Event()
        window = both.source.blocks[0].window(0, pages, writable=True)
        written = np.zeros(pages, dtype=np.bool_)

        def write() -> None:
            random = np.random.default_rng(5)
            while not done.is_set():
                some = random.integers(0, pages, 20)
                written[some] = True
                window[some, random.integers(0, 512)] += 1
                window[some[0], :] = 0

        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(5):
            both.one_pass([page_runs.single(0, pages)])
        done.set()
        writer.join()
        both.one_pass([page_runs.from_bitmap(written)])
        both.assert_equal()


def test_a_paced_sender_keeps_the_pace_and_its_batches_short() -> None:
    """Time is the pace's own: every wait that it asked for is counted instead of waited."""
    waits: list[float] = []

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    with transfer(512) as both:
        both.fill(0, 0, 512)
        sender = PageSender(both.at_source, both.source, Waits())
        received = both.pool.submit(both.receiver.receive)
        sent = sender.send(0, page_runs.single(0, 512), Pace(1e6))
        both.at_source.send(wire.Finished())
        received.result(20)
        assert sent.pages == 512
        # The clock hardly moves, so nearly all the time that the bytes take is waited for.
        assert len(waits) > 20
        assert sum(waits[-1:]) <= sent.wire_bytes / 1e6
        assert max(waits) > 1


def test_a_stop_ends_a_paced_sender_at_once() -> None:
    with transfer(4096) as both:
        both.fill(0, 0, 4096)
        received = both.pool.submit(both.receiver.receive)
        sent: Future[SentPages] = Future()

        def send() -> None:
            sent.set_result(both.sender.send(0, page_runs.single(0, 4096), Pace(65536)))

        thread = threading.Thread(target=send)
        thread.start()
        while not both.progress:
            thread.join(0.001)
        both.stop.set()
        outcome = sent.result(10)
        assert not outcome.complete
        assert 0 < outcome.pages < 100
        both.at_source.send(wire.Abort(reason="cancelled"))
        assert received.result(10) == wire.Abort(reason="cancelled")
        assert both.receiver.take_counts()[0] == outcome.pages


def test_a_stop_that_is_set_sends_nothing() -> None:
    with transfer(64) as both:
        both.fill(0, 0, 64)
        both.stop.set()
        assert both.sender.send(0, page_runs.single(0, 64)) == SentPages(complete=False)


def test_a_slow_link_makes_batches_short_and_a_fast_one_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that takes 100 ms is followed by one of half its size, down to a few pages."""
    sizes: list[int] = []
    write = FrameChannel.write

    def spy(channel: FrameChannel, data: wire.Bytes, more: bool = False) -> None:
        if memoryview(data).nbytes >= PAGE_BYTES:
            sizes.append(memoryview(data).nbytes // PAGE_BYTES)
        write(channel, data, more)

    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += step_s
        return now_s

    monkeypatch.setattr(FrameChannel, "write", spy)
    monkeypatch.setattr("transhume.migration.transfer.sender.time.monotonic", clock)
    with transfer(4096) as both:
        both.fill(0, 0, 4096)
        step_s = 0.1
        both.one_pass([page_runs.single(0, 1024)])
        assert sizes[:6] == [256, 128, 64, 32, 16, 16]
        step_s = 0.001
        sizes.clear()
        both.one_pass([page_runs.single(0, 4096)])
        assert max(sizes) == 256


def test_a_connection_that_breaks_amid_the_pages() -> None:
    with transfer(20000, buffer_bytes=65536) as both:
        both.fill(0, 0, 20000)

        def receive_and_leave() -> None:
            both.at_destination.receive_header()
            both.at_destination.shutdown()

        leaving = both.pool.submit(receive_and_leave)
        with pytest.raises(HostLost, match="host b"):
            both.sender.send(0, page_runs.single(0, 20000))
        leaving.result(10)


@pytest.mark.parametrize("runs", [[[0, 64]], [[page, 1] for page in range(0, 128, 2)]])
def test_a_source_that_dies_amid_the_pages(runs: list[list[int]]) -> None:
    with transfer(128) as both:
        received = both.pool.submit(both.receiver.receive)
        with both.at_source.frame():
            both.at_source.write(wire.encode_pages(0, np.array(runs, dtype=np.int64)))
            both.at_source.write(bytes(10 * PAGE_BYTES + 100))
        both.at_source.close()
        with pytest.raises(HostLost, match="host a closed the connection"):
            received.result(10)


ONE_RUN = [[0, 64]]
MANY_RUNS = [[page, 1] for page in range(0, 64, 2)]


@pytest.mark.parametrize("runs", [ONE_RUN, MANY_RUNS])
def test_a_source_that_falls_silent_amid_the_pages(runs: list[list[int]]) -> None:
    with transfer(64, silence_limit_s=0.1) as both:
        received = both.pool.submit(both.receiver.receive)
        with both.at_source.frame():
            both.at_source.write(wire.encode_pages(0, np.array(runs, dtype=np.int64)))
            both.at_source.write(bytes(PAGE_BYTES + 100))
        with pytest.raises(HostLost, match="host a has been silent"):
            received.result(10)


@pytest.mark.parametrize("runs", [ONE_RUN, MANY_RUNS])
def test_a_shutdown_ends_a_receiver_amid_the_pages(runs: list[list[int]]) -> None:
    with transfer(64) as both:
        received = both.pool.submit(both.receiver.receive)
        with both.at_source.frame():
            both.at_source.write(wire.encode_pages(0, np.array(runs, dtype=np.int64)))
        wait_until(lambda: both.at_destination.received_bytes > wire.HEADER_BYTES)
        both.at_destination.shutdown("cancelled")
        with pytest.raises(HostLost, match="closed here: cancelled"):
            received.result(10)


@pytest.mark.parametrize("step", [1, 2])
def test_a_destination_that_takes_nothing(step: int) -> None:
    with transfer(20000, buffer_bytes=65536, silence_limit_s=0.1) as both:
        both.fill(0, 0, 20000)
        runs = page_runs.from_pages(np.arange(0, 20000, step, dtype=np.int64))
        with pytest.raises(HostLost, match="host b"):
            both.sender.send(0, runs)


@pytest.mark.parametrize("step", [1, 2])
def test_a_shutdown_ends_a_sender_that_is_held_up(step: int) -> None:
    with transfer(20000, buffer_bytes=65536) as both:
        both.fill(0, 0, 20000)
        runs = page_runs.from_pages(np.arange(0, 20000, step, dtype=np.int64))
        sent = both.pool.submit(both.sender.send, 0, runs)
        wait_until(lambda: both.at_source.sent_bytes > 0)
        both.at_source.shutdown("cancelled")
        with pytest.raises(HostLost, match="closed here: cancelled"):
            sent.result(10)


@pytest.mark.parametrize(
    "frame",
    [
        lambda: wire.encode_zero(0, page_runs.single(64, 1)),
        lambda: wire.encode_zero(1, page_runs.single(0, 1)),
        lambda: b"\0" * 1000,
    ],
)
def test_a_peer_that_breaks_the_protocol_changes_no_page(frame: Callable[[], bytes]) -> None:
    with transfer(64) as both:
        received = both.pool.submit(both.receiver.receive)
        with both.at_source.frame():
            both.at_source.write(frame())
        with pytest.raises(PeerProtocolError):
            received.result(10)
        assert both.destination.blocks[0].populated_runs().tolist() == []


@pytest.mark.parametrize("runs", [ONE_RUN, MANY_RUNS])
def test_memory_that_cannot_be_written_is_the_hosts_fault(runs: list[list[int]]) -> None:
    with transfer(64) as both:
        both.fill(0, 0, 64)
        fd = both.destination.blocks[0].fd
        read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        os.dup2(read_only, fd, inheritable=False)
        os.close(read_only)
        received = both.pool.submit(both.receiver.receive)
        both.sender.send(0, np.array(runs, dtype=np.int64))
        with pytest.raises(KernelError, match="transhume-ram0"):
            received.result(10)


def test_device_state_passes_through() -> None:
    state = os.urandom(3 << 20)
    with transfer(64) as both:
        received = bytearray()

        def receive() -> wire.Message:
            while True:
                frame = both.receiver.receive()
                if not isinstance(frame, bytes):
                    return frame
                received.extend(frame)

        last = both.pool.submit(receive)
        both.at_source.send_state(state)
        end = wire.StateEnd(length_bytes=len(state), sha256="0" * 64)
        both.at_source.send(end)
        assert last.result(10) == end
        assert received == state
