"""QEMU's command line for a VM: a pure function, the same on both ends of a migration.

Both ends must build the same machine, or the device state of one does not load into the other: every
device has an id and an address of its own here, the machine type is versioned, and nothing depends on
the host but the paths of the folder and the numbers of the inherited file descriptors, which are not
part of the guest's machine.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from transhume.model.errors import Refused
from transhume.model.vm import ADDITIONS_MAX, Accel, Disk, Display, RamBlock, VmSpec
from transhume.vmm.paths import VmPaths

DEFAULT_BINARY = "qemu-system-x86_64"

TCG_TRIM_BYTES = 8192
"""Under TCG, QEMU's own migration engine loses pages of RAM blocks whose size is a multiple of 256 KiB.

Up to 8.2 its fast way of reading the dirty bitmap forgets to tell TCG that the pages are clean again, so
later writes go unnoticed (mended in 9.0, "physmem: Fix migration dirty bitmap coherency with TCG memory
access"). A block of another size takes the slow way, which is right. See docs/decisions/0009.
"""

VGA_MEMORY_MIB = 8
"""The frame buffer's size. It travels with the device state, so more of it would lengthen the downtime."""

VGA_SLOT = 1

FIRST_DISK_SLOT = 4
"""Disk i sits in this slot of the PCI bus plus i: lower slots are for the display and what may come."""

DISKS_MAX = 0x1F - FIRST_DISK_SLOT
"""Slot 0x1f holds the chipset's own devices."""

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

CPU_MODELS = {Accel.TCG: "max", Accel.KVM: "host"}

_UUID_SPACE = uuid.UUID("6d0c1a1e-53bb-4d8a-9d0a-3f0f4a1c7f7e")


def ram_blocks(spec: VmSpec) -> tuple[RamBlock, ...]:
    """The RAM blocks of a VM whose accelerator is known: `numa_nodes` of them, and what was added.

    The first have whole MiB (some may have one more), less `TCG_TRIM_BYTES` under TCG. What was added keeps
    its size: a guest takes nothing of a block that is not whole.
    """
    mib, odd = divmod(spec.first_memory_bytes >> 20, spec.numa_nodes)
    trim_bytes = TCG_TRIM_BYTES if spec.accel is Accel.TCG else 0
    sizes_bytes = [((mib + (index < odd)) << 20) - trim_bytes for index in range(spec.numa_nodes)]
    return tuple(
        RamBlock(index=index, name=f"ram{index}", size_bytes=size_bytes)
        for index, size_bytes in enumerate((*sizes_bytes, *spec.added_bytes))
    )


def backend_properties(block: RamBlock, fd: int) -> dict[str, Any]:
    """The QEMU object behind a RAM block whose memfd is the descriptor `fd` there.

    A file, not QEMU's own memfd backend: newer QEMUs leave only files out of their stream.
    """
    return {
        "qom-type": "memory-backend-file",
        "id": block.name,
        "size": block.size_bytes,
        "share": True,
        "mem-path": f"/proc/self/fd/{fd}",
    }


def added_device(spec: VmSpec, number: int) -> dict[str, Any]:
    """The QEMU device that shows the guest what was added as `number`, from 0."""
    block = f"ram{spec.numa_nodes + number}"
    return {"driver": "pc-dimm", "id": f"dimm{number}", "memdev": block, "slot": number}


def build_command(
    spec: VmSpec, paths: VmPaths, ram_fds: Sequence[int], *, incoming: bool, binary: str = DEFAULT_BINARY
) -> list[str]:
    """The arguments that start QEMU for `spec`, beginning with the program.

    `ram_fds` are the numbers, in QEMU, of the memfds that become its RAM, one for each of `ram_blocks`.
    With `incoming` QEMU waits, paused, for device state and does not start the guest by itself.

    Raises `Refused` when the specification is not resolved (machine type, accelerator) or impossible.
    """
    _check(spec, paths)
    blocks = ram_blocks(spec)
    assert len(ram_fds) == len(blocks), "one memfd for each RAM block"
    command = [binary, "-name", f"guest={spec.name},debug-threads=on"]
    command += ["-nodefaults", "-no-user-config", "-msg", "timestamp=on", "-sandbox", SANDBOX]
    command += _machine(spec)
    command += _memory(spec, blocks, ram_fds)
    command += _boot(spec)
    command += _display(spec, paths)
    for index, disk in enumerate(spec.disks):
        command += _disk(index, disk)
    command += _sockets(paths)
    if incoming:
        command += ["-incoming", "defer", "-S"]
    return command


def _check(spec: VmSpec, paths: VmPaths) -> None:
    paths.check_lengths()
    if spec.accel is Accel.AUTO or not spec.machine_type:
        raise Refused(
            f"VM {spec.name} has no {'accelerator' if spec.accel is Accel.AUTO else 'machine type'} yet: "
            "the host must fill in what the specification leaves open before the VM starts"
        )
    if len(spec.disks) > DISKS_MAX:
        raise Refused(
            f"VM {spec.name} has {len(spec.disks)} disks and there is room for {DISKS_MAX}: remove some"
        )
    if (spec.initrd or spec.append) and not spec.kernel:
        raise Refused(f"VM {spec.name} has an initrd or a kernel command line, but no kernel: name one too")


def _machine(spec: VmSpec) -> list[str]:
    """The board without its built-in SATA and SMBus controllers and its SMM, which no guest here uses.

    What is not there is not in the device state either: this shortens the downtime.
    """
    sockets = spec.numa_nodes if spec.cpus % spec.numa_nodes == 0 else spec.cpus
    cores = spec.cpus // sockets
    machine = f"type={spec.machine_type},sata=off,smbus=off,smm=off,dump-guest-core=off"
    if not _has_nodes(spec):
        machine += ",memory-backend=ram0"
    return [
        *("-machine", machine),
        *("-accel", spec.accel.value),
        *("-cpu", spec.cpu_model or CPU_MODELS[spec.accel]),
        *("-smp", f"cpus={spec.cpus},maxcpus={spec.cpus},sockets={sockets},cores={cores},threads=1"),
        *("-uuid", str(uuid.uuid5(_UUID_SPACE, spec.name))),
    ]


def _has_nodes(spec: VmSpec) -> bool:
    """Whether the guest is shown NUMA nodes. Memory that is added belongs to one, so it needs them too."""
    return spec.numa_nodes > 1 or spec.max_memory_bytes > 0


def _memory(spec: VmSpec, blocks: Sequence[RamBlock], ram_fds: Sequence[int]) -> list[str]:
    first = blocks[: spec.numa_nodes]
    room = ""
    if spec.max_memory_bytes:
        room = f",slots={ADDITIONS_MAX},maxmem={spec.max_memory_bytes >> 10}K"
    arguments = ["-m", f"size={sum(block.size_bytes for block in first) >> 10}K{room}"]
    for block, fd in zip(blocks, ram_fds, strict=True):
        arguments += ["-object", json.dumps(backend_properties(block, fd))]
    if _has_nodes(spec):
        for block, cpus in zip(first, _cpus_of_nodes(spec), strict=True):
            arguments += ["-numa", f"node,nodeid={block.index},memdev={block.name}{cpus}"]
    for number in range(len(spec.added_bytes)):
        arguments += ["-device", json.dumps(added_device(spec, number))]
    return arguments


def _cpus_of_nodes(spec: VmSpec) -> list[str]:
    """Which vCPUs belong to each NUMA node, as QEMU writes it; nothing for a node without any."""
    first = 0
    nodes = []
    for node in range(spec.numa_nodes):
        share = spec.cpus // spec.numa_nodes + (node < spec.cpus % spec.numa_nodes)
        nodes.append(f",cpus={first}-{first + share - 1}" if share else "")
        first += share
    return nodes


def _boot(spec: VmSpec) -> list[str]:
    arguments = []
    if spec.kernel:
        arguments += ["-kernel", spec.kernel]
    if spec.initrd:
        arguments += ["-initrd", spec.initrd]
    if spec.append:
        arguments += ["-append", spec.append]
    return arguments


def _display(spec: VmSpec, paths: VmPaths) -> list[str]:
    if spec.display is Display.NONE:
        return ["-display", "none"]
    return [
        *("-vnc", f"unix:{_escaped(paths.vnc_socket)}"),
        *("-device", f"VGA,id=vga0,vgamem_mb={VGA_MEMORY_MIB},bus=pcie.0,addr={VGA_SLOT:#x}"),
    ]


def _disk(index: int, disk: Disk) -> list[str]:
    """A virtio disk on a format node on a protocol node.

    `drop-cache` makes the new owner of a shared image forget what it cached before it became the owner.
    Errors stop the guest instead of reaching it: storage that comes back is no reason for a guest to
    remount its root read-only.
    """
    cache = {"direct": disk.cache_direct, "no-flush": False}
    protocol = {
        "driver": "host_device" if disk.path.startswith("/dev/") else "file",
        "node-name": f"disk{index}-file",
        "filename": disk.path,
        "cache": cache,
        "drop-cache": True,
        "read-only": disk.read_only,
    }
    image = {
        "driver": disk.format,
        "node-name": f"disk{index}-image",
        "file": f"disk{index}-file",
        "cache": cache,
        "read-only": disk.read_only,
    }
    device = f"virtio-blk-pci,id=disk{index},drive=disk{index}-image,serial=disk{index},bootindex={index + 1}"
    address = f"bus=pcie.0,addr={FIRST_DISK_SLOT + index:#x}"
    return [
        *("-blockdev", json.dumps(protocol)),
        *("-blockdev", json.dumps(image)),
        *("-device", f"{device},{address},rerror=stop,werror=stop"),
    ]


def _sockets(paths: VmPaths) -> list[str]:
    serial = f"socket,id=serial0,path={_escaped(paths.serial_socket)},server=on,wait=off"
    arguments = [
        *("-chardev", f"{serial},logfile={_escaped(paths.serial_log)},logappend=on"),
        *("-serial", "chardev:serial0"),
    ]
    for name, path in (("qmp0", paths.qmp_socket), ("qmp1", paths.mover_qmp_socket)):
        arguments += [
            *("-chardev", f"socket,id={name},path={_escaped(path)},server=on,wait=off"),
            *("-mon", f"chardev={name},mode=control"),
        ]
    return arguments


def _escaped(path: object) -> str:
    """A path inside an option list: QEMU takes a doubled comma for one comma."""
    return str(path).replace(",", ",,")
