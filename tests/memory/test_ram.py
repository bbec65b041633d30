"""The RAM of a QEMU process is found, read, written and emptied from outside."""

from __future__ import annotations

import os

import numpy as np
import pytest
from tests.memory.processes import make_memfd, python_child, qemu

from transhume.memory.ram import GuestRam
from transhume.model.errors import VmmError
from transhume.model.vm import PAGE_BYTES

MIB = 1 << 20

MAPPER = """
import mmap, os, sys
size = int(sys.argv[2])
fd = int(sys.argv[1])
maps = [mmap.mmap(fd, length, getattr(mmap, kind), offset=offset)
        for kind, length, offset in eval(sys.argv[3])]
print("mapped", flush=True)
sys.stdin.readline()
"""


def test_all_blocks_of_a_sandboxed_qemu() -> None:
    fds = [make_memfd(8 * MIB, index) for index in range(3)]
    with qemu(tuple(fds), 8 * MIB) as machine:
        ram = GuestRam.of_process(machine.pid)
        assert [each.name for each in ram.ram_blocks] == [
            "transhume-ram0",
            "transhume-ram1",
            "transhume-ram2",
        ]
        assert [each.index for each in ram.ram_blocks] == [0, 1, 2]
        assert ram.size_bytes == 24 * MIB
        assert ram.page_count == 24 * MIB // PAGE_BYTES
        with open(f"/proc/{machine.pid}/mem", "r+b", buffering=0) as memory:
            for each in ram.blocks:
                memory.seek(each.address + 5 * PAGE_BYTES)
                memory.write(each.block.name.encode())
        for index, each in enumerate(ram.blocks):
            name = each.block.name.encode()
            assert os.pread(fds[index], len(name), 5 * PAGE_BYTES) == name
            assert each.window(5, 1).tobytes().startswith(name)
            assert each.populated_runs().tolist() == [[5, 1]]
        ram.punch_all()
        assert [len(runs) for runs in ram.populated_runs()] == [0, 0, 0]
        ram.close()
    for fd in fds:
        os.close(fd)


def test_populated_runs_of_a_part() -> None:
    ram = GuestRam.of_fds([make_memfd(MIB)])
    block = ram.blocks[0]
    for page in (0, 1, 2, 10, 11, 255):
        os.pwrite(block.fd, b"x", page * PAGE_BYTES)
    assert block.populated_runs().tolist() == [[0, 3], [10, 2], [255, 1]]
    assert block.populated_runs(1, 10).tolist() == [[1, 2], [10, 1]]
    assert block.populated_runs(3, 5).tolist() == []
    assert block.populated_runs(255, 1).tolist() == [[255, 1]]
    ram.close()


def test_a_writable_window_writes() -> None:
    ram = GuestRam.of_fds([make_memfd(MIB)])
    window = ram.blocks[0].window(7, 2, writable=True)
    window[1, 3] = 0x11223344
    del window
    assert np.frombuffer(os.pread(ram.blocks[0].fd, 32, 8 * PAGE_BYTES), dtype=np.uint64)[3] == 0x11223344
    ram.close()


@pytest.mark.parametrize(
    ("mappings", "reason"),
    [
        ([("MAP_SHARED", MIB, 0), ("MAP_SHARED", MIB, 0)], "more than once"),
        ([("MAP_PRIVATE", MIB, 0)], "privately"),
        ([("MAP_SHARED", MIB // 2, 0)], "of the"),
        ([("MAP_SHARED", MIB // 2, MIB // 2)], "more than once"),
        ([], "maps no"),
    ],
)
def test_ram_that_cannot_be_tracked_is_refused(mappings: list[tuple[str, int, int]], reason: str) -> None:
    fd = make_memfd(MIB)
    with python_child(MAPPER, fd, MIB, mappings, fds=(fd,)) as child:
        assert child.hear() == "mapped"
        open_before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(VmmError, match=reason):
            GuestRam.of_process(child.pid)
        assert len(os.listdir("/proc/self/fd")) == open_before
    os.close(fd)


def test_a_block_that_is_missing() -> None:
    fd = make_memfd(MIB, 1)
    with python_child(MAPPER, fd, MIB, [("MAP_SHARED", MIB, 0)], fds=(fd,)) as child:
        assert child.hear() == "mapped"
        with pytest.raises(VmmError, match="not all from 0 on"):
            GuestRam.of_process(child.pid)
    os.close(fd)


def test_a_process_that_is_gone() -> None:
    with python_child("pass") as child:
        child.process.wait()
        with pytest.raises(VmmError, match="does not run"):
            GuestRam.of_process(child.pid)
