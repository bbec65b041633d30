"""Get hold of a running QEMU's memory: its userfaultfd, its RAM, its dirty pages."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from transhume.memory.pagemap import Scanner
from transhume.memory.ram import GuestRam
from transhume.memory.tracker import DirtyTracker
from transhume.memory.userfaultfd import Userfaultfd, create_in_process, find_existing, open_device
from transhume.model.errors import TranshumeError
from transhume.vmm.monitor import Monitor


async def attach_userfaultfd(monitor: Monitor, pid: int) -> Userfaultfd:
    """A duplicate of QEMU's userfaultfd: the one an earlier mover left there, or a new one.

    QEMU runs without privileges and may not make one by itself, so root's open device is lent to it for
    the one injected system call. Raises `KernelError` or `VmmError`; QEMU is then as it was.
    """
    uffd = find_existing(pid)
    if uffd is None:
        device = open_device()
        try:
            lent = await monitor.lend_fd(device)
            try:
                uffd = await asyncio.to_thread(create_in_process, pid, lent.number)
            finally:
                await monitor.take_back_fd(lent)
        finally:
            os.close(device)
    try:
        uffd.enable()
    except TranshumeError:
        uffd.close()
        raise
    return uffd


@dataclass
class TrackedRam:
    """A running VM's RAM with everything that is needed to follow its writes."""

    ram: GuestRam
    tracker: DirtyTracker
    _uffd: Userfaultfd
    _scanner: Scanner

    @classmethod
    async def attach(cls, monitor: Monitor, pid: int) -> TrackedRam:
        """Open everything; tracking begins with `tracker.arm()`. After an error nothing stays open."""
        uffd = await attach_userfaultfd(monitor, pid)
        try:
            ram = GuestRam.of_process(pid)
            try:
                scanner = Scanner(pid)
            except TranshumeError:
                ram.close()
                raise
        except TranshumeError:
            uffd.close()
            raise
        return cls(ram, DirtyTracker(uffd, scanner, ram), uffd, scanner)

    def close(self) -> None:
        """Close this process's descriptors. Tracking that is armed stays armed in the kernel."""
        self._scanner.close()
        self._uffd.close()
        self.ram.close()
