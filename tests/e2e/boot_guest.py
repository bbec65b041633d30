"""The boot-sector guest: assembled here, booted from a disk, judged by its memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transhume.memory.ram import GuestRam
from transhume.model.vm import PAGE_BYTES
from transhume.vmm.monitor import Monitor
from transhume.vmm.paths import VmPaths
from transhume.vmm.process import find_running

FIRST_PAGE = 0x20
PAGE_COUNT = 96
STILL_FIRST_PAGE = 0x1000
STILL_PAGE_COUNT = 256
IMAGE_BYTES = 1 << 20
SOURCE = Path(__file__).with_name("boot_sector.S")


def assemble(folder: Path, calm: bool = False) -> bytes:
    """The 512 bytes. `calm`: it rests between its sweeps."""
    part = folder / "boot.o"
    choice = ["-DCALM"] if calm else []
    subprocess.run(["gcc", "-c", "-m32", *choice, "-o", str(part), str(SOURCE)], check=True)
    flat = folder / "boot.bin"
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(part), str(flat)], check=True)
    sector = flat.read_bytes()
    assert len(sector) == 512
    return sector


def make_disk(path: Path, sector: bytes, vm_user: str) -> None:
    """A raw disk that boots it, owned by the user that QEMU runs as."""
    path.write_bytes(sector.ljust(IMAGE_BYTES, b"\0"))
    shutil.chown(path, vm_user)


@dataclass(frozen=True)
class Sweeps:
    """What the guest's pages held at one moment, while no vCPU ran."""

    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def newest(self) -> int:
        return self.begins[0]

    def fault(self) -> str:
        """What is wrong with the guest's memory; empty when nothing is."""
        if any(later > earlier for earlier, later in zip(self.begins, self.begins[1:], strict=False)):
            return f"a page is ahead of one that is written before it: {self.begins}"
        if self.begins[0] - self.begins[-1] > 1:
            return f"a page stayed behind: {self.begins}"
        torn = [page for page in range(PAGE_COUNT) if self.begins[page] != self.ends[page]]
        if len(torn) > 1 or any(self.begins[page] - self.ends[page] != 1 for page in torn):
            return f"pages {torn} differ between begin and end"
        return ""


async def read_sweeps(vm_dir: Path) -> Sweeps:
    """Stop the VM for a moment (by the mover's monitor: none may be at work) and read its pages."""
    paths = VmPaths(vm_dir)
    process = find_running(paths)
    assert process is not None, f"no QEMU runs in {vm_dir}"
    monitor = await Monitor.connect(paths.mover_qmp_socket)
    try:
        await monitor.stop()
        ram = GuestRam.of_process(process.pid)
        try:
            words = ram.blocks[0].window(FIRST_PAGE, PAGE_COUNT).view(np.uint32)
            sweeps = Sweeps(tuple(words[:, 0].tolist()), tuple(words[:, 1023].tolist()))
        finally:
            ram.close()
        await monitor.cont()
    finally:
        await monitor.close()
        process.close()
    return sweeps


@dataclass(frozen=True)
class StillPages:
    """Memory that has content and that the guest never touches."""

    page_count: int
    content: bytes


def fill_still_pages(vm_dir: Path, page_count: int = STILL_PAGE_COUNT) -> StillPages:
    """Give the guest memory that it never touches, each page another content. Before it is tracked."""
    content = b"".join(page.to_bytes(8, "little") * (PAGE_BYTES // 8) for page in range(1, page_count + 1))
    ram = _ram_of(vm_dir)
    try:
        os.pwrite(ram.blocks[0].fd, content, STILL_FIRST_PAGE * PAGE_BYTES)
    finally:
        ram.close()
    return StillPages(page_count, content)


def read_still_pages(vm_dir: Path, page_count: int = STILL_PAGE_COUNT) -> bytes:
    """What these pages hold now. Not while any is owed: reading would make it an empty one."""
    ram = _ram_of(vm_dir)
    try:
        return os.pread(ram.blocks[0].fd, page_count * PAGE_BYTES, STILL_FIRST_PAGE * PAGE_BYTES)
    finally:
        ram.close()


def _ram_of(vm_dir: Path) -> GuestRam:
    process = find_running(VmPaths(vm_dir))
    assert process is not None, f"no QEMU runs in {vm_dir}"
    try:
        return GuestRam.of_process(process.pid)
    finally:
        process.close()
