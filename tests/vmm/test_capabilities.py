"""What this machine can do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.vmm.machines import MACHINE_TYPE

from transhume.model.errors import VmmError
from transhume.vmm.capabilities import cpu_flags, kernel_release, kvm_obstacle, memory, probe_qemu


async def test_qemu_is_asked() -> None:
    facts = await probe_qemu()
    assert facts.version.count(".") == 2
    assert facts.default_machine_type.startswith("pc-q35-")
    assert facts.default_machine_type in facts.machine_types
    assert MACHINE_TYPE in facts.machine_types
    assert "q35" not in facts.machine_types, "an alias means another machine on another host"


async def test_a_missing_qemu_is_told() -> None:
    with pytest.raises(VmmError, match="no-such-qemu is not installed"):
        await probe_qemu("no-such-qemu")


async def test_a_program_that_is_no_qemu_is_told() -> None:
    with pytest.raises(VmmError, match="nobody listens"):
        await probe_qemu("/bin/true", deadline_s=0.05)


def test_kvm_needs_the_cpu(vm_user: str) -> None:
    """A host that is a guest itself may open the device and then hang its guests."""
    assert "neither vmx nor svm" in kvm_obstacle(vm_user, flags=["fpu", "sse"])


def test_kvm_needs_a_device_that_the_user_may_open(vm_user: str, root: Path) -> None:
    device = root / "kvm"
    assert "is missing" in kvm_obstacle(vm_user, flags=["vmx"], device=device)
    device.touch(mode=0o600)
    assert "is not readable and writable" in kvm_obstacle(vm_user, flags=["svm"], device=device)
    device.chmod(0o666)
    assert kvm_obstacle(vm_user, flags=["svm"], device=device) == ""
    device.chmod(0o600)
    assert kvm_obstacle("root", flags=["svm"], device=device) == ""


def test_facts_of_the_machine(root: Path) -> None:
    assert kernel_release() == os.uname().release
    now = memory()
    assert 0 < now.available_bytes <= now.total_bytes
    assert "sse2" in cpu_flags()
    assert list(cpu_flags()) == sorted(cpu_flags())
    cpuinfo = root / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: vmx fpu\n\nprocessor\t: 1\nflags\t\t: other\n")
    assert cpu_flags(cpuinfo) == ("fpu", "vmx")
    cpuinfo.write_text("processor\t: 0\n")
    assert cpu_flags(cpuinfo) == ()
