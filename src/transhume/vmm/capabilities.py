"""What this machine can do for VMs: its QEMU, KVM, CPU and memory, asked once."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transhume.model.errors import VmmError
from transhume.vmm.bare_qemu import bare_qemu
from transhume.vmm.command_line import DEFAULT_BINARY
from transhume.vmm.rights import user_rights

KVM_DEVICE = Path("/dev/kvm")

DEFAULT_BOARD = "q35"
"""The family of machines that VMs get: its newest version here, unless they name another."""


@dataclass(frozen=True)
class QemuFacts:
    """`machine_types` are concrete names; `default_machine_type` is what the alias `q35` means here."""

    version: str
    machine_types: tuple[str, ...]
    default_machine_type: str


@dataclass(frozen=True)
class Memory:
    total_bytes: int
    available_bytes: int


async def probe_qemu(binary: str = DEFAULT_BINARY, deadline_s: float = 20.0) -> QemuFacts:
    """Start a QEMU without a machine, ask it, and end it. `VmmError` when there is none or it fails."""
    async with bare_qemu(binary, deadline_s=deadline_s) as qmp:
        return _facts(qmp.version, await qmp.execute("query-machines"))


def kvm_obstacle(vm_user: str, flags: Iterable[str] | None = None, device: Path = KVM_DEVICE) -> str:
    """Why KVM cannot run guests for `vm_user` here; empty when it can.

    That the device opens is not enough: a host that is itself a guest may offer it without the CPU's
    support, runs firmware with it and then hangs. `flags` are the CPU's, this machine's by default.
    """
    if not {"vmx", "svm"} & set(cpu_flags() if flags is None else flags):
        return "KVM is not used: the CPU shows neither vmx nor svm, so guests would hang; VMs run under TCG"
    try:
        node = device.stat()
    except OSError:
        return f"KVM is not there: {device} is missing; load the module kvm_intel or kvm_amd"
    uid, gid, further = user_rights(vm_user)
    if not _may_read_and_write(node, uid, (gid, *further)):
        return f"KVM is closed to {vm_user}: {device} is not readable and writable; give it to the group kvm"
    return ""


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The CPU's flags as Linux reports them, sorted; those of the first CPU."""
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    return tuple(sorted(found[1].split())) if found else ()


def cpu_vendor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Who made the CPU, as in `GenuineIntel`; empty where Linux does not say."""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", cpuinfo.read_text(), re.MULTILINE)
    return found[1] if found else ""


def kernel_release() -> str:
    """Linux's release, as in `6.18.3-cloud-amd64`."""
    return os.uname().release


def memory(meminfo: Path = Path("/proc/meminfo")) -> Memory:
    """This machine's memory; available is Linux's own estimate (`MemAvailable`)."""
    kib = dict(re.findall(r"^(\w+):\s*(\d+) kB$", meminfo.read_text(), re.MULTILINE))
    return Memory(int(kib["MemTotal"]) << 10, int(kib["MemAvailable"]) << 10)


def _facts(version: str, machines: list[dict[str, str]]) -> QemuFacts:
    names = tuple(sorted(machine["name"] for machine in machines))
    default = next((machine["name"] for machine in machines if machine.get("alias") == DEFAULT_BOARD), "")
    if not default:
        raise VmmError(f"this QEMU ({version}) has no {DEFAULT_BOARD} machine: install QEMU for x86 systems")
    return QemuFacts(version, names, default)


def _may_read_and_write(node: os.stat_result, uid: int, groups: Iterable[int]) -> bool:
    if uid == 0:
        return True
    if node.st_uid == uid:
        wanted = stat.S_IRUSR | stat.S_IWUSR
    elif node.st_gid in groups:
        wanted = stat.S_IRGRP | stat.S_IWGRP
    else:
        wanted = stat.S_IROTH | stat.S_IWOTH
    return node.st_mode & wanted == wanted
