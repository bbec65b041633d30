"""A guest whose writes the test steers, so that each step of a claim is made to happen and then looked at.

The pre-copy is held by the guest, not by time: as long as it sweeps over all of its pages, more of them
are left after each pass than the migration's threshold allows. Told to sweep over few, it lets go.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.boot_guest import make_disk, read_sweeps
from tests.e2e.farm import Farm, until

from transhume.host.config import DEFAULT_VM_USER
from transhume.memory import runs as page_runs
from transhume.memory.ram import GuestBlock, GuestRam
from transhume.model.migration import Migration, Phase
from transhume.model.vm import PAGE_BYTES, Accel, Disk, VmSpec
from transhume.vmm.paths import VmPaths

HOT_PAGE = 0x20
HOT_PAGES = 96
FEW_PAGES = 4
QUIET_PAGE = 0x98
MEMORY_BYTES = 48 << 20

HELD: dict[str, Any] = {
    "bandwidth_bytes_s": 1 << 20,
    "threshold_pages": HOT_PAGES // 2,
    "max_downtime_ms": 1.0,
    "deadline_s": 100.0,
    "on_deadline": "abort",
    "peer_silence_limit_s": 60.0,
    "verify": True,
    "post_copy": False,
}
"""Options with which the pre-copy goes on until the guest is told to sweep over few pages."""

_SOURCE = Path(__file__).with_name("steered_guest.S")
_WRITE_PROTECTED = 1 << 57
"""The bit of /proc/PID/pagemap that says: write-protected by a userfaultfd."""


class SteeredGuest:
    """The VM `vm`, with its guest, on whichever hosts of the farm it has a QEMU."""

    def __init__(self, farm: Farm, spec: VmSpec) -> None:
        self.farm = farm
        self.spec = spec

    @classmethod
    async def boot(cls, farm: Farm) -> SteeredGuest:
        """Create and start it on host alpha, and wait until it sweeps."""
        disk = farm.disks / "steered.img"
        make_disk(disk, _assembled(farm.disks), DEFAULT_VM_USER)
        spec = VmSpec(
            name="vm", memory_bytes=MEMORY_BYTES, cpus=1, disks=(Disk(path=str(disk)),), accel=Accel.TCG
        )
        async with farm.client() as client:
            await client.create_vm(spec, "alpha")
            await client.start_vm("vm")
        guest = cls(farm, spec)
        await guest.until_word("alpha", HOT_PAGE, 2)
        return guest

    def key(self, host: str, letter: bytes) -> None:
        """Send one letter to its serial port."""
        path = VmPaths(self.farm.vm_dir("vm", host)).serial_socket
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.connect(str(path))
            line.sendall(letter)

    @contextmanager
    def memory(self, host: str) -> Iterator[GuestBlock]:
        """The guest's RAM as it lies on a host."""
        ram = GuestRam.of_process(self.farm.qemu_pid("vm", host))
        try:
            yield ram.blocks[0]
        finally:
            ram.close()

    def word(self, host: str, page: int) -> int:
        """The number at the begin of a page, as the host's memfd holds it; zero where nothing is."""
        with self.memory(host) as block:
            word: int = struct.unpack("<I", os.pread(block.fd, 4, page * PAGE_BYTES))[0]
            return word

    def holds(self, host: str, page: int) -> bool:
        """Whether the host has memory behind a page of the guest."""
        with self.memory(host) as block:
            return page_runs.page_count(block.populated_runs(page, 1)) == 1

    def write_protected(self, page: int) -> bool:
        """Whether the kernel would sense the source's next write to a page."""
        pid = self.farm.qemu_pid("vm", "alpha")
        with self.memory("alpha") as block, open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek((block.address // PAGE_BYTES + page) * 8)
            entry: int = struct.unpack("<Q", pagemap.read(8))[0]
        return bool(entry & _WRITE_PROTECTED)

    async def until_word(self, host: str, page: int, at_least: int) -> int:
        """Wait until a page's number is so high; it is returned."""

        async def reached() -> int:
            word = self.word(host, page)
            return word if word >= at_least else 0

        word: int = await until(reached, f"page {page:#x} on {host} holds {at_least} or more")
        return word

    async def executes(self, host: str) -> int:
        """Prove that it runs on a host: its sweeps go on. Returns the newest one."""
        return await self.until_word(host, HOT_PAGE, self.word(host, HOT_PAGE) + 1)

    async def precopied(self, migration: str, iteration: int = 1) -> Migration:
        """Wait until the passes before `iteration` are over; the VM still runs at the source then."""

        async def there() -> Migration | None:
            async with self.farm.client() as client:
                record = await client.migration(migration)
            assert record.phase in (Phase.REQUESTED, Phase.PREPARED, Phase.PRECOPY), record
            assert not record.error, record.error
            progress = record.progress
            held = record.phase is Phase.PRECOPY and progress is not None and progress.iteration >= iteration
            return record if held else None

        record: Migration = await until(there, f"iteration {iteration} has begun")
        return record

    async def released(self, migration: str) -> Migration:
        """Let the pre-copy come to its end, and the migration to its own."""
        self.key("alpha", b"f")
        return await self.farm.ended(migration)

    async def assert_whole_at(self, host: str, at_least: int) -> None:
        """It goes on there, from where it was, over all of its pages, and its memory is whole."""
        assert self.word(host, HOT_PAGE) >= at_least
        self.key(host, b"a")

        async def whole() -> bool:
            return (await read_sweeps(self.farm.vm_dir("vm", host))).fault() == ""

        await until(whole, f"the guest sweeps over all pages on {host}")
        await self.farm.assert_sound("vm", host, at_least)


def _assembled(folder: Path) -> bytes:
    part, flat = folder / "steered.o", folder / "steered.bin"
    subprocess.run(["gcc", "-c", "-m32", "-o", str(part), str(_SOURCE)], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(part), str(flat)], check=True)
    return flat.read_bytes()
