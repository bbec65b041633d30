"""A guest of 512 bytes, and QEMUs that run it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

from transhume.model.vm import Accel, Disk, Display, VmSpec
from transhume.vmm.launch import Launched, launch
from transhume.vmm.paths import VmPaths
from transhume.vmm.process import QemuProcess

VM_USER = "transhume-vm"
MACHINE_TYPE = "pc-q35-7.2"

COUNTER_ADDRESS = 0x20000
"""Where the guest counts, in its physical memory."""

BOOT_SECTOR = (
    bytes.fromhex(
        "fa fc 31c0 8ed8"  # no interrupts, strings upwards, data segment 0
        "b81300 cd10"  # VGA mode 0x13: 320 by 200 dots, no cursor that blinks
        "b800a0 8ec0 31ff"  # the frame buffer
        "b900fa"  # 64000 dots:
        "89f8 aa e2fb"  # each shows the low byte of its own number
        "b80020 8ec0 31ff"  # the counter
        "baf803 b02e"  # the first serial port, and a full stop
        "6626ff05"  # for ever: count,
        "26833d00 75f6"  # and each time that the low 16 bits are zero
        "ee ebf3"  # write a full stop
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)


class Machines:
    """Starts VMs and keeps hold of them."""

    def __init__(self, root: Path, vm_user: str) -> None:
        self.root = root
        self.vm_user = vm_user
        self.started: list[Launched] = []

    def spec(
        self, *, boot: bool = False, display: Display = Display.NONE, cpus: int = 1, numa_nodes: int = 1
    ) -> VmSpec:
        """A small VM; with `boot` it runs the boot sector, else it stays in its firmware."""
        disks = (Disk(path=str(self._boot_disk())),) if boot else ()
        return VmSpec(
            name="small",
            memory_bytes=32 << 20,
            cpus=cpus,
            numa_nodes=numa_nodes,
            accel=Accel.TCG,
            machine_type=MACHINE_TYPE,
            display=display,
            disks=disks,
        )

    async def start(self, spec: VmSpec, folder: str = "one", *, incoming: bool = False) -> Launched:
        launched = await launch(spec, VmPaths(self.root / folder), vm_user=self.vm_user, incoming=incoming)
        self.started.append(launched)
        return launched

    async def end_all(self) -> None:
        for launched in self.started:
            await launched.process.kill()
            await launched.monitor.close()
            launched.process.close()

    def _boot_disk(self) -> Path:
        path = self.root / "boot.img"
        if not path.exists():
            path.write_bytes(BOOT_SECTOR.ljust(1 << 20, b"\0"))
            path.chmod(0o666)
        return path


async def until(reached: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
    """Wait for a condition that has no event of its own."""
    give_up_s = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < give_up_s, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(0.01)


def open_ram(process: QemuProcess, block: int = 0) -> int:
    """The descriptor of a RAM block of a running QEMU; the caller closes it."""
    return os.open(f"/proc/{process.pid}/fd/{process.record.ram_fds[block]}", os.O_RDWR)


def counter(process: QemuProcess) -> int:
    """How far the guest has counted."""
    fd = open_ram(process)
    try:
        return int.from_bytes(os.pread(fd, 4, COUNTER_ADDRESS), "little")
    finally:
        os.close(fd)


async def until_counting_on(process: QemuProcess) -> None:
    """The guest runs: its counter moves."""
    counted = counter(process)
    await until(lambda: counter(process) != counted, "the guest goes on")


async def until_counting(process: QemuProcess) -> None:
    await until(lambda: counter(process) > 1 << 16, "the guest counts")


def copy_ram(source: QemuProcess, destination: QemuProcess) -> None:
    """What the engine does, in its simplest form: copy the RAM of a VM that is stopped."""
    for block in range(len(source.record.ram_fds)):
        old, new = open_ram(source, block), open_ram(destination, block)
        try:
            _copy_data(old, new)
        finally:
            os.close(old)
            os.close(new)


def _copy_data(old: int, new: int) -> None:
    end = 0
    while True:
        try:
            start = os.lseek(old, end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(old, start, os.SEEK_HOLE)
        os.pwrite(new, os.pread(old, end - start, start), start)
