"""What this machine can do for VMs: its QEMU, KVM, CPU and memory, asked once."""

from __future__ import annotations

from dataclasses import dataclass

from transhume.vmm.command_line import DEFAULT_BINARY


@dataclass(frozen=True)
class QemuFacts:
    """`machine_types` are concrete names; `default_machine_type` is what the alias `q35` means here."""

    version: str
    machine_types: tuple[str, ...]
    default_machine_type: str


async def probe_qemu(binary: str = DEFAULT_BINARY, deadline_s: float = 20.0) -> QemuFacts:
    """Start a QEMU without a machine, ask it, and end it. `VmmError` when there is none or it fails."""
    raise NotImplementedError


def kvm_obstacle(vm_user: str) -> str:
    """Why KVM cannot run guests for `vm_user` here; empty when it can."""
    raise NotImplementedError


def cpu_flags() -> tuple[str, ...]:
    """The CPU's flags as Linux reports them, sorted; those of the first CPU."""
    raise NotImplementedError


def kernel_release() -> str:
    raise NotImplementedError


@dataclass(frozen=True)
class Memory:
    total_bytes: int
    available_bytes: int


def memory() -> Memory:
    """This machine's memory; available is Linux's own estimate (`MemAvailable`)."""
    raise NotImplementedError
