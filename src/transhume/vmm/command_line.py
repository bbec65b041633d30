"""QEMU's command line for a VM: a pure function, the same on both ends of a migration.

Both ends must build the same machine, or the device state of one does not load into the other: every
device has an id and an address of its own here, the machine type is versioned, and nothing depends on
the host but the paths of the folder and the numbers of the inherited file descriptors, which are not
part of the guest's machine.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from transhume.model.vm import Accel, RamBlock, VmSpec
from transhume.vmm.paths import VmPaths

DEFAULT_BINARY = "qemu-system-x86_64"

VGA_MEMORY_MIB = 8
"""The frame buffer's size. It travels with the device state, so more of it would lengthen the downtime."""

FIRST_DISK_SLOT = 4
"""Disk i sits in this slot of the PCI bus plus i: lower slots are for the display and what may come."""

DISKS_MAX = 0x1F - FIRST_DISK_SLOT
"""Slot 0x1f holds the chipset's own devices."""

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

CPU_MODELS = {Accel.TCG: "max", Accel.KVM: "host"}

_UUID_SPACE = uuid.UUID("6d0c1a1e-53bb-4d8a-9d0a-3f0f4a1c7f7e")


def ram_blocks(spec: VmSpec) -> tuple[RamBlock, ...]:
    """The RAM blocks of a VM: `numa_nodes` of them, in whole MiB; the first may be one larger."""
    mib, odd = divmod(spec.memory_bytes >> 20, spec.numa_nodes)
    return tuple(
        RamBlock(index=index, name=f"ram{index}", size_bytes=(mib + (index < odd)) << 20)
        for index in range(spec.numa_nodes)
    )


def build_command(
    spec: VmSpec, paths: VmPaths, ram_fds: Sequence[int], *, incoming: bool, binary: str = DEFAULT_BINARY
) -> list[str]:
    """The arguments that start QEMU for `spec`, beginning with the program.

    `ram_fds` are the numbers, in QEMU, of the memfds that become its RAM, one for each of `ram_blocks`.
    With `incoming` QEMU waits, paused, for device state and does not start the guest by itself.

    Raises `Refused` when the specification is not resolved (machine type, accelerator) or impossible.
    """
    raise NotImplementedError
