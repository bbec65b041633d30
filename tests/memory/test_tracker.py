"""No write of a tracked process is ever missed."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from tests.memory.processes import (
    DIRTIED_PAGES,
    Child,
    make_memfd,
    needs_tracking,
    python_child,
    qemu,
    wait_until,
)

from transhume.memory import runs as page_runs
from transhume.memory.pagemap import Scanner
from transhume.memory.ram import GuestRam
from transhume.memory.runs import Runs
from transhume.memory.tracker import DirtyTracker
from transhume.memory.userfaultfd import Userfaultfd, create_in_process, find_existing, open_device
from transhume.model.errors import KernelError, TranshumeError, VmmError
from transhume.model.vm import PAGE_BYTES

pytestmark = needs_tracking

MIB = 1 << 20
ROUNDS = 10_000
ROUNDS_BETWEEN_STOPS = 50

WRITER = """
# Writes counters into random pages of its mappings, with stores and with the kernel's copies, until it
# is told to pause; then says so and waits. "w BLOCK PAGE" writes one page, "f" begins to write freely.
import mmap, os, random, struct, sys
fds = [int(each) for each in sys.argv[1].split(",")]
size = int(sys.argv[2])
maps = [mmap.mmap(fd, size) for fd in fds]
views = [memoryview(each) for each in maps]
device = os.open("/dev/userfaultfd", os.O_RDWR)
pages = size // 4096
source = open("/dev/zero", "rb", buffering=0)
counter = 0
orders = sys.stdin.fileno()
os.set_blocking(orders, False)
def order():
    try:
        return os.read(orders, 100).decode().split()
    except BlockingIOError:
        return None
def wait():
    os.set_blocking(orders, True)
    line = os.read(orders, 100).decode().split()
    os.set_blocking(orders, False)
    return line
print("ready", device, flush=True)
line = wait()
while line:
    if line[0] == "w":
        maps[int(line[1])][int(line[2]) * 4096] = 77
        print("written", flush=True)
        line = wait()
        continue
    print("writing", flush=True)
    told = None
    while told is None:
        hot = random.randrange(pages)
        for _ in range(40):
            counter += 1
            page = hot if counter % 3 else random.randrange(pages)
            struct.pack_into("Q", random.choice(maps), page * 4096 + counter % 512 * 8, counter)
        if counter % 400 == 0:
            view = random.choice(views)
            source.readinto(view[page * 4096 + 100 : page * 4096 + 9000])
        told = order()
    print("paused", counter, flush=True)
    line = wait()
"""


@dataclass
class Tracked:
    child: Child
    ram: GuestRam
    uffd: Userfaultfd
    tracker: DirtyTracker

    def write(self, block_index: int, page: int) -> None:
        self.child.say(f"w {block_index} {page}")
        assert self.child.hear() == "written"

    def collected(self) -> list[list[list[int]]]:
        return [runs.tolist() for runs in self.tracker.collect()]


@contextlib.contextmanager
def tracking(block_count: int, size_bytes: int) -> Iterator[Tracked]:
    fds = tuple(make_memfd(size_bytes, index) for index in range(block_count))
    with contextlib.ExitStack() as stack:
        for fd in fds:
            stack.callback(os.close, fd)
        arguments = (",".join(str(fd) for fd in fds), size_bytes)
        child = stack.enter_context(python_child(WRITER, *arguments, fds=fds))
        word, device = child.hear().split()
        assert word == "ready"
        uffd = create_in_process(child.pid, int(device))
        stack.callback(uffd.close)
        ram = GuestRam.of_process(child.pid)
        stack.callback(ram.close)
        scanner = Scanner(child.pid)
        stack.callback(scanner.close)
        yield Tracked(child, ram, uffd, DirtyTracker(uffd, scanner, ram))


@pytest.fixture
def tracked() -> Iterator[Tracked]:
    with tracking(2, 2 * MIB) as each:
        yield each


def test_each_written_page_is_reported_once(tracked: Tracked) -> None:
    tracked.tracker.arm()
    assert tracked.collected() == [[], []]
    tracked.write(0, 3)
    tracked.write(0, 4)
    tracked.write(1, 511)
    assert tracked.collected() == [[[3, 2]], [[511, 1]]]
    assert tracked.collected() == [[], []]
    tracked.write(0, 3)
    assert tracked.collected() == [[[3, 1]], []]


def test_pages_that_were_there_before_are_tracked_too(tracked: Tracked) -> None:
    tracked.write(0, 9)
    tracked.tracker.arm()
    assert tracked.collected() == [[], []]
    tracked.write(0, 9)
    assert tracked.collected() == [[[9, 1]], []]


def test_many_separate_pages_are_each_found_once() -> None:
    """More than the kernel's own buffer holds; and a look that clears nothing finds the same again."""
    pages = range(3, 4096, 3)
    with tracking(1, 16 * MIB) as tracked:
        tracked.tracker.arm()
        for page in pages:
            tracked.write(0, page)
        block = tracked.ram.blocks[0]
        scanner = Scanner(tracked.child.pid)
        try:
            expected = [[page, 1] for page in pages]
            for _ in range(2):
                assert scanner.get(block.address, block.block.size_bytes).tolist() == expected
            assert scanner.get(block.address + 300 * PAGE_BYTES, 7 * PAGE_BYTES).tolist() == [
                [0, 1],
                [3, 1],
                [6, 1],
            ]
        finally:
            scanner.close()
        assert tracked.collected() == [expected]
        assert tracked.collected() == [[]]


def test_disarm_ends_it_and_it_can_begin_again(tracked: Tracked) -> None:
    tracked.tracker.arm()
    tracked.write(0, 1)
    tracked.tracker.disarm()
    tracked.write(0, 2)
    with pytest.raises(KernelError, match="not, or no longer, tracked"):
        tracked.tracker.collect()
    tracked.tracker.disarm()
    tracked.tracker.arm()
    assert tracked.collected() == [[], []]
    tracked.write(1, 2)
    assert tracked.collected() == [[], [[2, 1]]]


def test_what_an_earlier_engine_left_is_taken_over(tracked: Tracked) -> None:
    tracked.tracker.arm()
    tracked.write(0, 1)
    tracked.uffd.close()
    again = find_existing(tracked.child.pid)
    assert again is not None
    scanner = Scanner(tracked.child.pid)
    tracker = DirtyTracker(again, scanner, tracked.ram)
    tracker.arm()
    assert [len(runs) for runs in tracker.collect()] == [0, 0]
    tracked.write(1, 8)
    assert [runs.tolist() for runs in tracker.collect()] == [[], [[8, 1]]]
    tracker.disarm()
    tracked.write(1, 9)
    scanner.close()
    again.close()


def test_a_process_without_one_has_none_to_take_over() -> None:
    with python_child("import sys; print('ready', flush=True); sys.stdin.readline()") as child:
        assert child.hear() == "ready"
        assert find_existing(child.pid) is None


def test_a_process_that_dies_while_it_is_tracked(tracked: Tracked) -> None:
    tracked.tracker.arm()
    tracked.child.process.kill()
    tracked.child.process.wait()
    with pytest.raises(VmmError, match="ended"):
        tracked.tracker.collect()
    with pytest.raises(VmmError, match="ended"):
        tracked.tracker.arm()
    with pytest.raises(VmmError, match="ended"):
        tracked.tracker.disarm()
    with pytest.raises(VmmError, match="does not run"):
        Scanner(tracked.child.pid)
    with pytest.raises(VmmError, match="does not run"):
        find_existing(tracked.child.pid)


def test_a_number_that_is_no_userfaultfd_device() -> None:
    with python_child("import sys; print('ready', flush=True); sys.stdin.readline()") as child:
        assert child.hear() == "ready"
        with pytest.raises(TranshumeError, match="could not create"):
            create_in_process(child.pid, 0)
        assert find_existing(child.pid) is None


def test_scattered_pages_beyond_one_buffer() -> None:
    """More runs than the scanner's buffer holds come in several steps, and none is lost between them."""
    with tracking(1, 300 * MIB) as tracked:
        tracked.tracker.arm()
        with open(f"/proc/{tracked.child.pid}/mem", "r+b", buffering=0) as memory:
            for page in range(0, 300 * MIB // PAGE_BYTES, 2):
                memory.seek(tracked.ram.blocks[0].address + page * PAGE_BYTES)
                memory.write(b"x")
        (runs,) = tracked.tracker.collect()
        assert (runs[:, 1] == 1).all()
        assert runs[:, 0].tolist() == list(range(0, 300 * MIB // PAGE_BYTES, 2))


@pytest.mark.timeout(300)  # ten seconds on an idle machine; a busy one may take its time
def test_no_write_is_missed_in_ten_thousand_rounds() -> None:
    """A process writes all the time; what the rounds copied equals its memory whenever it pauses."""
    size_bytes = 4 * MIB
    with tracking(2, size_bytes) as tracked:
        copies = [np.zeros((size_bytes // PAGE_BYTES, PAGE_BYTES), dtype=np.uint8) for _ in range(2)]
        views = [
            np.frombuffer(
                mmap.mmap(each.fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ), dtype=np.uint8
            ).reshape(-1, PAGE_BYTES)
            for each in tracked.ram.blocks
        ]

        def copy(dirty: list[Runs]) -> int:
            for index, runs in enumerate(dirty):
                for first, count in runs.tolist():
                    copies[index][first : first + count] = views[index][first : first + count]
            return sum(page_runs.page_count(runs) for runs in dirty)

        tracked.tracker.arm()
        copied = 0
        for _ in range(ROUNDS // ROUNDS_BETWEEN_STOPS):
            tracked.child.say("f")
            assert tracked.child.hear() == "writing"
            for _ in range(ROUNDS_BETWEEN_STOPS - 1):
                copied += copy(tracked.tracker.collect())
            tracked.child.say("p")
            assert tracked.child.hear().startswith("paused")
            copied += copy(tracked.tracker.collect())
            assert all(np.array_equal(left, right) for left, right in zip(copies, views, strict=True))
        assert copied > ROUNDS


def test_the_vcpu_of_a_sandboxed_qemu_without_privileges() -> None:
    """The whole way: device handed to QEMU, userfaultfd made inside it, its vCPU's writes seen."""
    fd = make_memfd(16 * MIB)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        machine = stack.enter_context(qemu((fd,), 16 * MIB, run=True))
        device = open_device()
        try:
            with machine.holding(device) as number:
                uffd = create_in_process(machine.pid, number)
        finally:
            os.close(device)
        ram = GuestRam.of_process(machine.pid)
        stack.callback(ram.close)
        scanner = Scanner(machine.pid)
        stack.callback(scanner.close)
        tracker = DirtyTracker(uffd, scanner, ram)
        tracker.arm()
        expected = [[DIRTIED_PAGES.start, len(DIRTIED_PAGES)]]
        wait_until(lambda: tracker.collect()[0].tolist() == expected)

        machine.execute("stop")
        tracker.collect()
        assert [len(runs) for runs in tracker.collect()] == [0]
        machine.execute("cont")
        wait_until(lambda: tracker.collect()[0].tolist() == expected)

        uffd.close()
        again = find_existing(machine.pid)
        assert again is not None
        stack.callback(again.close)
        DirtyTracker(again, scanner, ram).arm()
        wait_until(lambda: scanner.get_and_clear(ram.blocks[0].address, 16 * MIB).tolist() == expected)
        DirtyTracker(again, scanner, ram).disarm()
        assert machine.execute("query-status")["status"] == "running"
