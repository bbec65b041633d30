"""More RAM for a VM that runs: one more memfd, given to QEMU and shown to the guest as a memory module.

The guest is told by ACPI, as of a module that somebody plugs in, and takes it into use by itself if its
kernel is set to (`memhp_default_state=online`). It is not taken away again while the VM runs.
"""

from __future__ import annotations

import contextlib
import os

from transhume.model.errors import VmmError
from transhume.model.vm import VmSpec
from transhume.vmm.command_line import added_device, backend_properties, ram_blocks
from transhume.vmm.launch import create_ram
from transhume.vmm.monitor import Monitor
from transhume.vmm.paths import VmPaths, replace_file

_FD_NAME = "added-ram"


async def add_memory(monitor: Monitor, pid: int, paths: VmPaths, spec: VmSpec, size_bytes: int) -> VmSpec:
    """Give the VM behind `monitor`, QEMU process `pid`, one RAM block more; the VM as it is then.

    `spec` is what it runs with. Raises `Refused` when it has no room to grow and `VmmError` when QEMU
    refuses; it is as it was then.
    """
    grown = spec.with_added(size_bytes)
    block = ram_blocks(grown)[-1]
    (fd,) = create_ram([block])
    try:
        await monitor.qmp.execute_with_fd(fd, "getfd", fdname=_FD_NAME)
        number = _number_in(pid, os.fstat(fd).st_ino)
        await monitor.qmp.execute("object-add", **backend_properties(block, number))
    finally:
        os.close(fd)
        # QEMU opened the file anew; a monitor that is gone has closed what it held.
        with contextlib.suppress(VmmError):
            await monitor.qmp.execute("closefd", fdname=_FD_NAME)
    # Written first: whoever finds a block without its module can take it away; the other way round, a VM
    # would be moved without a part of its memory.
    replace_file(paths.spec_file, grown.model_dump_json())
    try:
        await monitor.qmp.execute("device_add", **added_device(grown, len(spec.added_bytes)))
    except VmmError:
        replace_file(paths.spec_file, spec.model_dump_json())
        await monitor.qmp.execute("object-del", id=block.name)
        raise
    return grown


async def settle_memory(monitor: Monitor, paths: VmPaths, spec: VmSpec) -> VmSpec:
    """Settle an addition that was interrupted: a block that no module shows to the guest goes again."""
    devices = await monitor.qmp.execute("query-memory-devices")
    shown = {str(each["data"]["memdev"]).rpartition("/")[2] for each in devices}
    backends = await monitor.qmp.execute("query-memdev")
    unused = {each["id"] for each in backends} - shown
    first = {block.name for block in ram_blocks(spec)[: spec.numa_nodes]}
    for name in sorted(unused - first):
        await monitor.qmp.execute("object-del", id=name)
    if len(shown) < len(spec.added_bytes):
        kept = spec.added_bytes[: len(shown)]
        gone_bytes = sum(spec.added_bytes[len(shown) :])
        spec = spec.model_copy(update={"added_bytes": kept, "memory_bytes": spec.memory_bytes - gone_bytes})
        replace_file(paths.spec_file, spec.model_dump_json())
    return spec


def _number_in(pid: int, inode: int) -> int:
    """The number of the descriptor in process `pid` that is open for the memfd with this inode."""
    folder = f"/proc/{pid}/fd"
    try:
        for entry in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.stat(f"{folder}/{entry}").st_ino == inode:
                    return int(entry)
    except OSError as error:
        raise VmmError(f"process {pid} ended while it was given memory") from error
    raise VmmError(f"process {pid} did not keep the memory that it was given")
