"""The doctor on this machine, and a guest that is really run. Needs root and QEMU."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from transhume.host.config import DEFAULT_VM_USER
from transhume.host.doctor import kvm, kvm_trial
from transhume.host.doctor.examine import examine
from transhume.host.doctor.kvm_trial import BOOT_SECTOR, run_guest
from transhume.host.doctor.subject import Subject
from transhume.model.finding import Level
from transhume.model.vm import Accel
from transhume.vmm.capabilities import KVM_DEVICE, kvm_obstacle

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the doctor needs root"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="the doctor needs QEMU"),
]


async def test_this_machine_is_not_called_broken(short_dir: Path) -> None:
    """A machine that runs these tests is fit to be a host; without KVM that is a note."""
    told: list[str] = []
    subject = Subject(short_dir / "state", DEFAULT_VM_USER, _free_port(), address="127.0.0.1")
    examined = await examine(subject, told.append)
    assert [finding for finding in examined.findings if finding.level is Level.ERROR] == []
    checks = {finding.check for finding in examined.findings}
    assert {"root", "kernel", "qemu", "cpu", "kvm", "memory", "storage", "ports", "services"} <= checks
    if kvm_obstacle(DEFAULT_VM_USER):
        assert {each.level for each in examined.findings if each.check == "kvm"} == {Level.NOTE}
    assert examined.inventory is not None
    assert examined.inventory.cpus_of["tcg"].models
    assert "KVM: running a guest" in told
    assert not (short_dir / "state").exists()


async def test_a_user_that_is_not_there_is_an_error_and_nothing_else_fails(short_dir: Path) -> None:
    examined = await examine(Subject(short_dir, "no-such-user", _free_port(), address="127.0.0.1"))
    errors = [finding for finding in examined.findings if finding.level is Level.ERROR]
    assert [finding.check for finding in errors] == ["vm-user"]
    assert errors[0].mend.startswith("useradd ")
    assert examined.inventory is None


async def test_the_trials_guest_gets_to_64_bit_mode() -> None:
    trial = await run_guest(Accel.TCG, DEFAULT_VM_USER, limit_s=60.0)
    assert trial.ran, trial
    assert (trial.letters, trial.hung) == ("RL", False)


async def test_a_guest_that_hangs_is_ended_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = b"\xb0R\xe6\xe9\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa"  # prints R, jumps to itself
    monkeypatch.setattr(kvm_trial, "BOOT_SECTOR", endless)
    before = _qemus()
    began_s = time.monotonic()
    trial = await run_guest(Accel.TCG, DEFAULT_VM_USER, limit_s=5.0)
    assert not trial.ran
    assert trial.hung
    assert trial.letters == "R"
    assert time.monotonic() - began_s < 20.0
    assert _qemus() <= before


@pytest.mark.skipif(not KVM_DEVICE.exists(), reason="there is no KVM here")
async def test_kvm_is_really_tried_and_what_came_of_it_is_told() -> None:
    facts = await kvm.gather(DEFAULT_VM_USER, try_anyway=True)
    assert facts.trial is not None
    assert facts.trial.duration_s < kvm_trial.TRIAL_LIMIT_S + 10.0
    (finding,) = kvm.judge(facts)
    if facts.trial.ran:
        assert finding.level is (Level.NOTE if facts.obstacle else Level.OK)
    else:
        assert kvm.outcome(facts.trial) in finding.words


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the assembler is not installed")
def test_the_sector_is_what_its_source_says(tmp_path: Path) -> None:
    source = Path(kvm_trial.__file__).with_name("kvm_guest.S")
    part, flat = tmp_path / "guest.o", tmp_path / "guest.bin"
    subprocess.run(["gcc", "-c", "-m32", "-o", str(part), str(source)], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(part), str(flat)], check=True)
    assert flat.read_bytes() == BOOT_SECTOR


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _qemus() -> set[str]:
    """The process ids of all QEMUs that were started with a boot sector of a trial."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"isa-debug-exit" in words:
            found.add(path.parent.name)
    return found
