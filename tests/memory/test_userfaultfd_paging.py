"""The kernel's half of paging: who misses a page waits, is named, gets it once, and goes on."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.memory.processes import needs_tracking
from tests.migration.paging.guest import Guest, content, guest_process, marked

from transhume.memory.pagemap import Scanner
from transhume.memory.userfaultfd import REGISTER_MISSING, REGISTER_WP, Userfaultfd, create_here
from transhume.model.errors import KernelError, VmmError
from transhume.model.vm import PAGE_BYTES

pytestmark = needs_tracking

PAGES = 64
FAULT_LIMIT_S = 20.0


class Source:
    """Pages of this process to be copied."""

    def __init__(self, *numbers: int) -> None:
        self.data = bytearray(b"".join(content(0, number) for number in numbers))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.data))
        self.length_bytes = len(self.data)


def fill_page(guest: Guest, page: int, source: Source) -> int:
    return guest.uffd.copy_page(guest.address(0, page), source.address)


def fill(guest: Guest, first: int, source: Source) -> int:
    return guest.uffd.copy(guest.address(0, first), source.address, source.length_bytes)


@pytest.fixture
def guest() -> Iterator[Guest]:
    with guest_process([PAGES]) as each:
        each.uffd.register(each.address(0, 0), PAGES * PAGE_BYTES, REGISTER_MISSING)
        yield each


@pytest.mark.parametrize("write", [False, True])
def test_who_misses_a_page_waits_is_named_and_goes_on(guest: Guest, write: bool) -> None:
    (guest.write_later if write else guest.read_later)(0, 3)
    (fault,) = guest.uffd.read_faults(FAULT_LIMIT_S)
    assert fault.address & ~(PAGE_BYTES - 1) == guest.address(0, 3)
    assert fault.thread == guest.child.pid
    assert fault.write is write
    assert guest.waiting() == (0, 1)
    assert guest.ram.blocks[0].populated_runs().tolist() == []

    assert fill(guest, 3, Source(3)) == PAGE_BYTES
    if write:
        assert guest.wrote()
        assert guest.in_memory(0, 3) == marked(content(0, 3))
    else:
        assert guest.saw(content(0, 3))
    assert guest.waiting() == (0, 0)
    assert guest.uffd.read_faults(0.0) == []


def test_one_page_for_one_that_waits(guest: Guest) -> None:
    guest.read_later(0, 9)
    guest.until_it_waits()
    assert fill_page(guest, 9, Source(5)) == PAGE_BYTES
    assert guest.saw(content(0, 5))
    assert fill_page(guest, 9, Source(6)) == 0
    assert guest.in_memory(0, 9) == content(0, 5)


def test_pages_that_nobody_waits_for_are_placed_too(guest: Guest) -> None:
    assert fill(guest, 8, Source(11, 12, 13)) == 3 * PAGE_BYTES
    assert guest.ram.blocks[0].populated_runs().tolist() == [[8, 3]]
    guest.read_later(0, 9)
    assert guest.saw(content(0, 12))
    assert guest.uffd.read_faults(0.0) == []


def test_the_whole_run_wakes_whoever_waits_in_it(guest: Guest) -> None:
    guest.read_later(0, 22)
    assert len(guest.uffd.read_faults(FAULT_LIMIT_S)) == 1
    assert fill(guest, 20, Source(16, 17, 18, 19)) == 4 * PAGE_BYTES
    assert guest.saw(content(0, 18))


@pytest.mark.parametrize("there", [(0,), (5,), (2, 3), (0, 2, 4), tuple(range(6))])
def test_a_page_that_is_there_is_never_overwritten(guest: Guest, there: tuple[int, ...]) -> None:
    numbers = (1, 2, 3, 4, 6, 8)
    for page in there:
        fill(guest, page, Source(page + 40))
        guest.write_later(0, page)
        assert guest.wrote()
    before = {page: guest.in_memory(0, page) for page in there}
    assert fill(guest, 0, Source(*numbers)) == (6 - len(there)) * PAGE_BYTES
    for page, number in enumerate(numbers):
        assert guest.in_memory(0, page) == before.get(page, content(0, number))


@pytest.mark.parametrize("there", [(), (0,), (3,), (1, 2), tuple(range(4))])
def test_zeros_are_placed_where_nothing_is(guest: Guest, there: tuple[int, ...]) -> None:
    for page in there:
        fill(guest, page, Source(page + 1))
    assert guest.uffd.zero_fill(guest.address(0, 0), 4 * PAGE_BYTES) == (4 - len(there)) * PAGE_BYTES
    for page in range(4):
        expected = content(0, page + 1) if page in there else bytes(PAGE_BYTES)
        assert guest.in_memory(0, page) == expected
        guest.read_later(0, page)
        assert guest.saw(expected)
    # A successor must be able to tell them from missing ones.
    assert guest.ram.blocks[0].populated_runs().tolist() == [[0, 4]]


@pytest.mark.parametrize("protects_first", [False, True])
def test_pages_that_are_placed_protected_are_written_when_the_guest_writes(
    guest: Guest, protects_first: bool
) -> None:
    """Whether somebody waits for the page or not, to read or to write, and whatever was there before."""
    guest.uffd.register(guest.address(0, 0), PAGES * PAGE_BYTES, REGISTER_MISSING | REGISTER_WP)
    if protects_first:
        guest.uffd.write_protect(guest.address(0, 0), PAGES * PAGE_BYTES)
    scanner = Scanner(guest.child.pid)

    def place(first: int, source: Source) -> None:
        placed = guest.uffd.copy(guest.address(0, first), source.address, source.length_bytes, True)
        assert placed == source.length_bytes

    def written(first: int, count: int) -> list[list[int]]:
        found: list[list[int]] = scanner.get(guest.address(0, first), count * PAGE_BYTES).tolist()
        return found

    try:
        guest.read_later(0, 20)
        guest.until_it_waits()
        place(20, Source(21))
        assert guest.saw(content(0, 21))
        place(21, Source(22, 23, 24))
        assert written(20, 4) == []
        guest.write_later(0, 24)
        guest.until_it_waits()
        place(24, Source(26))
        assert guest.wrote()
        assert guest.in_memory(0, 24) == marked(content(0, 26))
        guest.write_later(0, 22)
        assert guest.wrote()
        guest.read_later(0, 23)
        assert guest.saw(content(0, 24))
        assert written(20, 5) == [[2, 1], [4, 1]]
        assert written(20, 5) == [[2, 1], [4, 1]]
        fill(guest, 25, Source(26))
        assert written(25, 1) == [[0, 1]]  # placed without protection: it may have been written
    finally:
        scanner.close()


def test_who_waits_gets_zeros(guest: Guest) -> None:
    guest.write_later(0, 7)
    guest.until_it_waits()
    assert guest.uffd.zero_fill(guest.address(0, 7), PAGE_BYTES) == PAGE_BYTES
    assert guest.wrote()
    assert guest.in_memory(0, 7) == marked(bytes(PAGE_BYTES))


def test_who_is_woken_without_the_page_faults_anew(guest: Guest) -> None:
    guest.read_later(0, 30)
    (first,) = guest.uffd.read_faults(FAULT_LIMIT_S)
    assert guest.uffd.read_faults(0.0) == []  # it is told once
    guest.uffd.wake(guest.address(0, 0), PAGES * PAGE_BYTES)
    assert guest.uffd.read_faults(FAULT_LIMIT_S) == [first]
    fill(guest, 30, Source(31))
    assert guest.saw(content(0, 31))


@pytest.mark.parametrize("fills", ["copy", "copy_page", "zero_fill"])
def test_a_page_that_is_there_already_wakes_who_waits_for_it(guest: Guest, fills: str) -> None:
    """It came into the memfd by another way, so that nobody was woken."""
    guest.read_later(0, 12)
    guest.until_it_waits()
    os.pwrite(guest.ram.blocks[0].fd, content(0, 44), 12 * PAGE_BYTES)
    if fills == "copy":
        assert fill(guest, 12, Source(1)) == 0
    elif fills == "copy_page":
        assert fill_page(guest, 12, Source(1)) == 0
    else:
        assert guest.uffd.zero_fill(guest.address(0, 12), PAGE_BYTES) == 0
    assert guest.saw(content(0, 44))


def test_the_end_of_watching_lets_everybody_go_on(guest: Guest) -> None:
    guest.read_later(0, 12)
    guest.until_it_waits()
    guest.uffd.unregister(guest.address(0, 0), PAGES * PAGE_BYTES)
    assert guest.saw(bytes(PAGE_BYTES))
    guest.read_later(0, 13)
    assert guest.saw(bytes(PAGE_BYTES))
    with pytest.raises(KernelError, match="refused to fill"):
        fill(guest, 14, Source(1))


def test_watching_again_for_more_keeps_what_was_placed(guest: Guest) -> None:
    fill(guest, 2, Source(2))
    guest.uffd.register(guest.address(0, 0), PAGES * PAGE_BYTES, REGISTER_MISSING)
    guest.uffd.register(guest.address(0, 0), PAGES * PAGE_BYTES, REGISTER_MISSING | REGISTER_WP)
    assert fill(guest, 1, Source(6, 8, 9)) == 2 * PAGE_BYTES
    assert [guest.in_memory(0, page) for page in (1, 2, 3)] == [content(0, number) for number in (6, 2, 9)]


def test_a_process_that_has_ended(guest: Guest) -> None:
    guest.read_later(0, 3)
    guest.until_it_waits()
    guest.child.process.kill()
    guest.child.process.wait()
    with pytest.raises(VmmError, match="ended"):
        fill(guest, 3, Source(3))
    with pytest.raises(VmmError, match="ended"):
        fill_page(guest, 3, Source(3))
    with pytest.raises(VmmError, match="ended"):
        guest.uffd.zero_fill(guest.address(0, 3), PAGE_BYTES)
    assert guest.uffd.read_faults(0.0) == []


@pytest.fixture
def small_file() -> Iterator[int]:
    """A file of 16 pages in a file system with room for four."""
    folder = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={4 * PAGE_BYTES}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        if mounted.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr}")
        fd = os.open(folder / "ram", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        os.ftruncate(fd, 16 * PAGE_BYTES)
        yield fd
        os.close(fd)
    finally:
        folder.rmdir()


@pytest.mark.parametrize("fills", ["copy", "zero_fill"])
def test_a_host_without_memory_is_not_a_process_that_has_ended(small_file: int, fills: str) -> None:
    """The pager waits for memory, but gives up when QEMU is gone: it must be able to tell the two."""
    mapping = mmap.mmap(small_file, 16 * PAGE_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    uffd: Userfaultfd = create_here()
    source = Source(*range(1, 17))

    def place() -> int:
        if fills == "zero_fill":
            return uffd.zero_fill(address, 8 * PAGE_BYTES)
        return uffd.copy(address, source.address, 8 * PAGE_BYTES)

    try:
        uffd.register(address, 16 * PAGE_BYTES, REGISTER_MISSING)
        with pytest.raises(KernelError, match="no memory left"):
            place()
        there = os.fstat(small_file).st_blocks * 512 // PAGE_BYTES
        assert there == 4
        os.pwrite(small_file, b"theirs", 0)
        with pytest.raises(KernelError, match="no memory left"):
            place()
        assert os.pread(small_file, 6, 0) == b"theirs"
        uffd.unregister(address, 16 * PAGE_BYTES)
    finally:
        uffd.close()
