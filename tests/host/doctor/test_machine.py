"""Judgements about kernel, QEMU, KVM, CPU and clock, with made-up facts: good, bad and borderline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from transhume.host.doctor import clock, cpu, kernel, kvm, qemu, services
from transhume.host.doctor.kvm_trial import Trial
from transhume.model.finding import Finding, Level
from transhume.model.host import GuestCpus, ModelRank

ROOT = kernel.KernelFacts(effective_uid=0, machine="x86_64", release="6.18.0")
QEMU = qemu.QemuState("transhume-vm", version="7.2.22", has_q35=True)


def levels(findings: list[Finding]) -> set[Level]:
    return {finding.level for finding in findings}


def test_a_kernel_that_does_it_all() -> None:
    assert levels(kernel.judge(ROOT)) == {Level.OK}


def test_without_root_and_on_another_architecture_nothing_else_is_told() -> None:
    (finding,) = kernel.judge(replace(ROOT, effective_uid=1000, tracking=("odd",)))
    assert (finding.check, finding.level, finding.mend) == ("root", Level.ERROR, "run it with sudo")
    (finding,) = kernel.judge(replace(ROOT, machine="aarch64"))
    assert (finding.check, finding.level) == ("architecture", Level.ERROR)


def test_a_kernel_that_cannot_track_still_carries_vms() -> None:
    findings = kernel.judge(replace(ROOT, tracking=("Boot Linux 6.7 or newer.",)))
    (finding,) = [each for each in findings if each.check == "kernel"]
    assert finding.level is Level.WARNING
    assert "--engine qemu" in finding.mend
    assert Level.ERROR in levels(kernel.judge(replace(ROOT, memfd="no memory for it")))


@pytest.mark.parametrize(
    ("state", "check", "words"),
    [
        (replace(QEMU, version="", failure="qemu-x is not installed"), "qemu", "is not installed"),
        (replace(QEMU, version="7.1.9"), "qemu", "7.2 is the oldest"),
        (replace(QEMU, has_q35=False), "qemu", "no q35 machine"),
        (replace(QEMU, user_failure="there is none"), "vm-user", "there is no user transhume-vm"),
        (replace(QEMU, sandbox_failure="seccomp is not there"), "sandbox", "seccomp is not there"),
    ],
)
def test_a_qemu_that_will_not_do(state: qemu.QemuState, check: str, words: str) -> None:
    (finding,) = qemu.judge(state)
    assert (finding.check, finding.level) == (check, Level.ERROR)
    assert words in finding.words
    assert finding.mend


@pytest.mark.parametrize("version", ["7.2.0", "7.10.1", "10.0.0"])
def test_a_qemu_that_will_do(version: str) -> None:
    assert levels(qemu.judge(replace(QEMU, version=version))) == {Level.OK}


def test_without_kvm_a_host_is_a_host_all_the_same() -> None:
    missing = kvm.KvmFacts(device=False, obstacle="KVM is not there")
    assert levels(kvm.judge(missing)) == {Level.NOTE}
    hung = kvm.KvmFacts(True, "the CPU shows neither", Trial(False, hung=True, duration_s=8.0))
    (finding,) = kvm.judge(hung)
    assert finding.level is Level.NOTE
    assert "it hung before its first instruction for 8 s" in finding.words


def test_kvm_that_vms_would_get_must_run_guests() -> None:
    assert levels(kvm.judge(kvm.KvmFacts(True, "", Trial(True, "RL")))) == {Level.OK}
    (finding,) = kvm.judge(kvm.KvmFacts(True, "", Trial(False, "R", hung=True, duration_s=8.2)))
    assert finding.level is Level.ERROR
    assert "it hung in real mode for 8 s" in finding.words
    (finding,) = kvm.judge(kvm.KvmFacts(True, "", Trial(False, "", said="failed to set MSR 0x10a")))
    assert "QEMU ended before its first instruction; QEMU said: failed to set MSR 0x10a" in finding.words


def test_the_best_cpu_is_told_with_its_level() -> None:
    cpus = GuestCpus(models={"kvm64-v1": ModelRank(1, 26), "Haswell-v4": ModelRank(3, 60)})
    (finding,) = cpu.judge({"kvm": cpus}, "GenuineIntel")
    assert (finding.level, finding.words) == (
        Level.OK,
        "GenuineIntel under kvm: up to Haswell-v4 (x86-64-v3)",
    )
    old = GuestCpus(models={"kvm64-v1": ModelRank(1, 26)})
    assert levels(cpu.judge({"kvm": old}, "")) == {Level.NOTE}
    assert levels(cpu.judge({"kvm": GuestCpus()}, "")) == {Level.NOTE}
    assert levels(cpu.judge({}, "")) == {Level.WARNING}


@pytest.mark.parametrize(
    ("offset_s", "error_s", "level"),
    [
        (0.2, 0.01, Level.OK),
        (-1.4, 0.5, Level.OK),  # the answer took a second: it may be within
        (-1.4, 0.1, Level.WARNING),
        (60.9, 1.0, Level.WARNING),
        (-62.0, 1.0, Level.ERROR),
        (7200.0, 0.0, Level.ERROR),
    ],
)
def test_a_clock_beside_the_controllers(offset_s: float, error_s: float, level: Level) -> None:
    finding, kept = clock.judge(clock.ClockFacts(True, offset_s, error_s))
    assert finding.level is level
    assert kept.level is Level.OK
    if level is not Level.OK:
        assert ("ahead of" if offset_s > 0 else "behind") in finding.words


def test_a_clock_that_nobody_keeps() -> None:
    assert levels(clock.judge(clock.ClockFacts(False))) == {Level.WARNING}
    assert levels(clock.judge(clock.ClockFacts(None))) == {Level.NOTE}
    assert clock.synchronized() in (True, False, None)


def test_the_offset_is_that_of_the_middle() -> None:
    assert clock.offset(100.0, 102.0, 91.0) == (10.0, 1.0)


def test_what_kills_large_processes_is_told_and_libvirt_is_fine() -> None:
    assert levels(services.judge({"bash", "sshd"})) == {Level.OK}
    assert levels(services.judge({"libvirtd", "etcd"})) == {Level.NOTE}
    (finding,) = services.judge({"earlyoom"})
    assert finding.level is Level.WARNING
    assert "earlyoom" in finding.mend
    assert services.gather()
