"""The whole examination of a server, check by check."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from transhume.host.doctor import cpu, kernel, kvm, memory, network, qemu, services, storage
from transhume.host.doctor.subject import Subject
from transhume.host.inventory import Inventory
from transhume.model.finding import Finding, Level
from transhume.model.host import HostInventory

Progress = Callable[[str], None]
"""Told what is being looked at, before each part."""


@dataclass(frozen=True)
class Examined:
    """The findings, and the inventory that this server would report as a host: None when QEMU cannot be
    asked."""

    findings: list[Finding]
    inventory: HostInventory | None = None


async def examine(subject: Subject, progress: Progress = lambda _: None) -> Examined:
    """All that can be found out on this server alone, and on the way to the controller if one is named.

    Takes about a second, and up to `kvm_trial.TRIAL_LIMIT_S` longer where guests hang under KVM. Changes
    nothing.
    """
    progress("kernel")
    findings = kernel.judge(kernel.gather())
    if any(finding.level is Level.ERROR for finding in findings):
        return Examined(findings)  # without root, or elsewhere than on x86-64, the rest would be wrong
    progress("QEMU")
    state = await qemu.gather(subject.vm_user)
    findings += qemu.judge(state)
    inventory = None
    if state.sound:
        progress("CPU models")
        inventory = (await Inventory.measure(subject.vm_user)).now()
        findings += cpu.judge(inventory.cpus_of, inventory.cpu_vendor)
        progress("KVM: running a guest")
        findings += kvm.judge(await kvm.gather(subject.vm_user, try_anyway=subject.try_kvm))
    progress("memory, storage and network")
    findings += memory.judge(memory.gather())
    findings += storage.judge(await storage.gather(subject.state_dir, subject.vm_user))
    ports = network.gather_ports(subject.address, subject.port)
    findings += network.judge_ports(ports, daemon_runs=subject.daemon_runs)
    findings += network.judge_bridges(network.bridges())
    findings += services.judge(services.gather())
    if subject.controller is not None:
        progress("the way to the controller")
        findings += network.judge_way(await asyncio.to_thread(network.gather_way, subject.controller))
    return Examined(findings, inventory)
