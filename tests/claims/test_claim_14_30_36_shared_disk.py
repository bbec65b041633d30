"""Claims 14, 30 and 36: the disk stays where it is, in storage that both computers share.

"storing the contents of the source virtual disk in a storage arrangement shared by both the source and
destination computers; and preparing a virtual disk of the destination VM by mapping the virtual disk of the
destination VM to the same physical addresses as the source virtual disk in the shared storage arrangement."
Claim 36 says it of claim 33.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.claims.steered_guest import HELD, HOT_PAGE, SteeredGuest
from tests.e2e.farm import Farm

from transhume.model.migration import Outcome
from transhume.model.vm import PAGE_BYTES
from transhume.vmm.monitor import Monitor
from transhume.vmm.paths import VmPaths

pytestmark = pytest.mark.timeout(240)

DISK_BYTES = 256 << 20


def opened(pid: int) -> set[tuple[int, int]]:
    """The files that a process has open, by device and inode."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        status = path.stat()
        found.add((status.st_dev, status.st_ino))
    return found


async def test_claims_14_30_and_the_disk_of_36(farm: Farm) -> None:
    guest = await SteeredGuest.boot(farm)
    disk = Path(guest.spec.disks[0].path)
    os.truncate(disk, DISK_BYTES)
    status = disk.stat()
    storage = (status.st_dev, status.st_ino)
    migration = await farm.begin("vm", "beta", **HELD)
    await guest.precopied(migration)
    # Both virtual disks are mapped to the same blocks of the same storage.
    assert storage in opened(farm.qemu_pid("vm", "alpha"))
    assert storage in opened(farm.qemu_pid("vm", "beta"))
    record = await guest.released(migration)
    assert record.outcome is Outcome.COMPLETED, record.error
    # So none of its contents travelled.
    assert record.report.wire_bytes < DISK_BYTES // 8
    # The destination VM has the contents: started anew from its reset, it boots from them.
    before = guest.word("beta", HOT_PAGE)
    monitor = await Monitor.connect(VmPaths(farm.vm_dir("vm", "beta")).mover_qmp_socket)
    try:
        await monitor.stop()
        with guest.memory("beta") as block:
            os.pwrite(block.fd, bytes(4), HOT_PAGE * PAGE_BYTES)
        await monitor.qmp.execute("system_reset")
        await monitor.cont()
    finally:
        await monitor.close()
    again = await guest.until_word("beta", HOT_PAGE, 2)
    assert again < before
