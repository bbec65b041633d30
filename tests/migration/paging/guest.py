"""A process whose memory is missing in part, in the place of a QEMU, and the memory that it should find."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tests.memory.processes import Child, make_memfd, python_child, wait_until

from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestRam
from transhume.memory.runs import Runs
from transhume.memory.userfaultfd import Userfaultfd, create_in_process
from transhume.model.vm import PAGE_BYTES

MARK = b"written!"
MARK_AT = 2048

_CODE = """
# Answers orders. It touches its memory by way of system calls, which wait without holding up other threads.
#   r BLOCK PAGE  the page's checksum      w BLOCK PAGE  write the mark, say so
#   use SEED      every page, in a random order, in three threads: says how many were not as they should be
import mmap, os, random, struct, sys, threading, zlib
fds = [int(each) for each in sys.argv[1].split(",")]
mark, mark_at = sys.argv[2].encode(), int(sys.argv[3])
views = [memoryview(mmap.mmap(fd, os.fstat(fd).st_size)) for fd in fds]
device = os.open("/dev/userfaultfd", os.O_RDWR)
marks = os.memfd_create("mark")
os.write(marks, mark)

def right(block, page):
    if page % 5 == 0 or page % 7 == 0:
        return bytes(4096)
    return struct.pack("<Q", 1 << 63 | block << 32 | page) * 512

def look(scratch, block, page):
    os.pwrite(scratch, views[block][page * 4096 : page * 4096 + 4096], 0)
    return os.pread(scratch, 4096, 0)

def write(block, page):
    start = page * 4096 + mark_at
    assert os.preadv(marks, [views[block][start : start + len(mark)]], 0) == len(mark)

def use(pages, wrong):
    scratch = os.memfd_create("scratch")
    written = set()
    for block, page in pages * 2:
        content = right(block, page)
        if page % 3 == 1 and (block, page) not in written:
            write(block, page)
            written.add((block, page))
        if (block, page) in written:
            content = content[:mark_at] + mark + content[mark_at + len(mark) :]
        if look(scratch, block, page) != content:
            wrong.append((block, page))
    os.close(scratch)

scratch = os.memfd_create("scratch")
print(device, flush=True)
for line in sys.stdin:
    order, *rest = line.split()
    numbers = [int(each) for each in rest]
    if order == "r":
        print(zlib.crc32(look(scratch, *numbers)), flush=True)
    elif order == "w":
        write(*numbers)
        print("written", flush=True)
    else:
        pages = [(block, page) for block, view in enumerate(views) for page in range(len(view) // 4096)]
        random.Random(numbers[0]).shuffle(pages)
        wrong = []
        threads = [threading.Thread(target=use, args=(pages[part::3], wrong)) for part in range(3)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        print("used", len(wrong), *wrong[:5], flush=True)
"""


def content(block: int, page: int) -> bytes:
    """What the source has there. Every fifth page is a hole, every seventh was filled with zeros."""
    if page % 5 == 0 or page % 7 == 0:
        return bytes(PAGE_BYTES)
    return struct.pack("<Q", 1 << 63 | block << 32 | page) * (PAGE_BYTES // 8)


def marked(page_content: bytes) -> bytes:
    """The same page after the guest has written its mark."""
    return page_content[:MARK_AT] + MARK + page_content[MARK_AT + len(MARK) :]


def used(block: int, page: int) -> bytes:
    """What is there in the end, when the guest has used all of its memory."""
    return marked(content(block, page)) if page % 3 == 1 else content(block, page)


@contextlib.contextmanager
def source_ram(block_pages: Sequence[int]) -> Iterator[GuestRam]:
    """Memory with `content`."""
    ram = GuestRam.of_fds([make_memfd(pages * PAGE_BYTES, index) for index, pages in enumerate(block_pages)])
    try:
        for index, pages in enumerate(block_pages):
            for page in range(pages):
                if page % 5:
                    os.pwrite(ram.blocks[index].fd, content(index, page), page * PAGE_BYTES)
        yield ram
    finally:
        ram.close()


@dataclass
class Guest:
    """The process, and this one's handles on its memory."""

    child: Child
    ram: GuestRam
    uffd: Userfaultfd

    def address(self, block: int, page: int) -> int:
        return self.ram.blocks[block].address + page * PAGE_BYTES

    def read_later(self, block: int, page: int) -> None:
        self.child.say(f"r {block} {page}")

    def write_later(self, block: int, page: int) -> None:
        self.child.say(f"w {block} {page}")

    def saw(self, expected: bytes) -> bool:
        """Wait for the answer to `read_later`."""
        return int(self.child.hear()) == zlib.crc32(expected)

    def wrote(self) -> bool:
        """Wait for the answer to `write_later`."""
        return self.child.hear() == "written"

    def in_memory(self, block: int, page: int) -> bytes:
        return os.pread(self.ram.blocks[block].fd, PAGE_BYTES, page * PAGE_BYTES)

    def waiting(self) -> tuple[int, int]:
        """How many faults nobody has read, and how many threads wait in all (the kernel counts them)."""
        lines = dict(
            line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{self.uffd.fd}").read_text().splitlines()
        )
        return int(lines["pending"]), int(lines["total"])

    def until_it_waits(self) -> None:
        wait_until(lambda: self.waiting()[1] > 0)


@contextlib.contextmanager
def guest_process(block_pages: Sequence[int]) -> Iterator[Guest]:
    """A process with empty RAM blocks of that many pages and a userfaultfd; nothing is registered yet."""
    fds = tuple(make_memfd(pages * PAGE_BYTES, index) for index, pages in enumerate(block_pages))
    with contextlib.ExitStack() as stack:
        for fd in fds:
            stack.callback(os.close, fd)
        arguments = (",".join(str(fd) for fd in fds), MARK.decode(), MARK_AT)
        child = stack.enter_context(python_child(_CODE, *arguments, fds=fds))
        uffd = create_in_process(child.pid, int(child.hear()))
        stack.callback(uffd.close)
        ram = GuestRam.of_process(child.pid)
        stack.callback(ram.close)
        yield Guest(child, ram, uffd)


def pages(*numbers: int) -> Runs:
    """A set of pages from their numbers."""
    return page_runs.from_pages(np.array(sorted(set(numbers)), dtype=np.int64))
