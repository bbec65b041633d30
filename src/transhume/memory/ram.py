"""Guest RAM as this process reaches it: the memfds that a QEMU process maps.

QEMU maps each RAM block whole, shared, from a memfd called `transhume-ramN`. This process opens the
same memfds through /proc/PID/fd, which works for root whoever made them, and reads and writes the
guest's pages without QEMU's help: with preadv and pwrite, so that a mover stays small whatever the size of
the VM, and pays no page faults. `window` is for a look at a few pages.

Never read a hole through a mapping: for a shared memfd that allocates the page (preadv does not). Ask
`populated_runs`.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from transhume.memory import runs as page_runs
from transhume.memory.runs import Runs
from transhume.memory.syscalls import punch_hole
from transhume.model.errors import KernelError, VmmError
from transhume.model.vm import PAGE_BYTES, RamBlock

MEMFD_PREFIX = "transhume-ram"
WORDS_PER_PAGE = PAGE_BYTES // 8
Words = NDArray[np.uint64]
"""The content of consecutive pages, shape (pages, 512)."""

_MAPS_LINE = re.compile(
    r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<access>\S+) (?P<offset>[0-9a-f]+) "
    r"(?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+) (?P<inode>\d+)\s+/memfd:transhume-ram(?P<index>\d+) "
)


@dataclass(frozen=True)
class GuestBlock:
    """One RAM block: its memfd in this process and, when a QEMU process maps it, where it does so.

    `address` is in QEMU's address space; 0 when no process is known.
    """

    block: RamBlock
    fd: int
    address: int = 0

    @property
    def page_count(self) -> int:
        return self.block.size_bytes // PAGE_BYTES

    def window(self, first_page: int, page_count: int, writable: bool = False) -> Words:
        """Map some pages. The mapping ends with the last reference to the array."""
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        mapping = mmap.mmap(
            self.fd, page_count * PAGE_BYTES, mmap.MAP_SHARED, access, offset=first_page * PAGE_BYTES
        )
        return np.frombuffer(mapping, dtype=np.uint64).reshape(page_count, WORDS_PER_PAGE)

    def populated_runs(self, first_page: int = 0, page_count: int | None = None) -> Runs:
        """The pages of the range that have memory behind them; the others are holes and read as zeros."""
        if page_count is None:
            page_count = self.page_count - first_page
        position, end = first_page * PAGE_BYTES, (first_page + page_count) * PAGE_BYTES
        bounds: list[int] = []
        while position < end:
            try:
                start = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError:  # ENXIO: only holes from here on
                break
            if start >= end:
                break
            position = min(os.lseek(self.fd, start, os.SEEK_HOLE), end)
            bounds += (start, position)
        pages = np.array(bounds, dtype=np.int64) // PAGE_BYTES
        return page_runs.from_bounds(pages[::2], pages[1::2])

    def punch(self, first_page: int, page_count: int) -> None:
        """Make a range read as zeros and take no memory, for every process that maps it."""
        try:
            punch_hole(self.fd, first_page * PAGE_BYTES, page_count * PAGE_BYTES)
        except OSError as error:
            raise KernelError(f"RAM block {self.block.name} cannot be emptied: {error.strerror}.") from None


class GuestRam:
    """All RAM blocks of one VM, in the order of their indices."""

    def __init__(self, blocks: Sequence[GuestBlock]) -> None:
        self.blocks = tuple(blocks)
        assert [each.block.index for each in blocks] == list(range(len(blocks)))

    @classmethod
    def of_process(cls, pid: int) -> GuestRam:
        """Open the RAM of a running QEMU. Raises `VmmError` when the process has no such RAM.

        Refuses RAM that is not mapped shared, whole and once: writes would escape the tracker.
        """
        mappings = _ram_mappings(pid)
        opened: list[GuestBlock] = []
        try:
            for index, mapping in enumerate(mappings):
                fd = _open_memfd(pid, mapping)
                opened.append(GuestBlock(RamBlock(index=index, name=mapping.name, size_bytes=0), fd))
                size_bytes = os.fstat(fd).st_size
                if mapping.length_bytes != size_bytes:
                    raise VmmError(
                        f"Process {pid} maps {mapping.length_bytes} of the {size_bytes} bytes of "
                        f"{mapping.name}. Start the VM with Transhume, which maps RAM whole."
                    )
                block = RamBlock(index=index, name=mapping.name, size_bytes=size_bytes)
                opened[-1] = GuestBlock(block, fd, mapping.address)
        except BaseException:
            for each in opened:
                os.close(each.fd)
            raise
        return cls(opened)

    @classmethod
    def of_fds(cls, fds: Sequence[int]) -> GuestRam:
        """RAM blocks from memfds that the caller has open, in order. Takes the descriptors over."""
        return cls(
            [
                GuestBlock(
                    RamBlock(index=index, name=f"{MEMFD_PREFIX}{index}", size_bytes=os.fstat(fd).st_size), fd
                )
                for index, fd in enumerate(fds)
            ]
        )

    @property
    def ram_blocks(self) -> tuple[RamBlock, ...]:
        return tuple(each.block for each in self.blocks)

    @property
    def size_bytes(self) -> int:
        return sum(each.block.size_bytes for each in self.blocks)

    @property
    def page_count(self) -> int:
        return self.size_bytes // PAGE_BYTES

    def populated_runs(self) -> list[Runs]:
        """For each block, the pages with memory behind them."""
        return [each.populated_runs() for each in self.blocks]

    def punch_all(self) -> None:
        """Empty every block: all of it reads as zeros afterwards. Only for a VM that does not run."""
        for each in self.blocks:
            each.punch(0, each.page_count)

    def close(self) -> None:
        """Close the memfds of this process. QEMU keeps its own."""
        for each in self.blocks:
            os.close(each.fd)
        self.blocks = ()


@dataclass
class _Mapping:
    """Where a process maps one memfd: one stretch of addresses, which the kernel may list in pieces."""

    name: str
    device: int
    inode: int
    address: int
    length_bytes: int


def _ram_mappings(pid: int) -> list[_Mapping]:
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            lines = maps.readlines()
    except (FileNotFoundError, ProcessLookupError):
        raise VmmError(f"Process {pid} does not run.") from None
    except PermissionError:
        raise KernelError(f"/proc/{pid}/maps cannot be read. Run as root.") from None
    found: dict[int, _Mapping] = {}
    for line in lines:
        match = _MAPS_LINE.match(line)
        if match is not None:
            _add_mapping(pid, found, match)
    if not found:
        raise VmmError(f"Process {pid} maps no {MEMFD_PREFIX}N: its RAM is not a memfd of Transhume's.")
    if sorted(found) != list(range(len(found))):
        raise VmmError(f"Process {pid} maps the RAM blocks {sorted(found)}, but not all from 0 on.")
    return [found[index] for index in sorted(found)]


def _add_mapping(pid: int, found: dict[int, _Mapping], match: re.Match[str]) -> None:
    start, end, offset = (int(match[group], 16) for group in ("start", "end", "offset"))
    index = int(match["index"])
    name = f"{MEMFD_PREFIX}{index}"
    if not match["access"].endswith("s"):
        raise VmmError(f"Process {pid} maps {name} privately. Start it with share=on.")
    mapping = found.get(index)
    if mapping is None and offset == 0:
        device = os.makedev(int(match["major"], 16), int(match["minor"], 16))
        found[index] = _Mapping(name, device, int(match["inode"]), start, end - start)
    elif mapping is not None and offset == mapping.length_bytes == start - mapping.address:
        mapping.length_bytes += end - start
    else:
        raise VmmError(f"Process {pid} maps {name} more than once: writes would escape the tracker.")


def _open_memfd(pid: int, mapping: _Mapping) -> int:
    """Open the process's memfd by way of any descriptor of its own for the same file."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) == (mapping.device, mapping.inode):
                return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # closed since the folder was listed
    raise VmmError(f"Process {pid} maps {mapping.name}, but keeps no descriptor of it open.")
