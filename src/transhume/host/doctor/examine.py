"""The whole examination of a server, check by check."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from transhume.host.doctor import clock, cpu, kernel, kvm, memory, network, qemu, services, storage
from transhume.host.doctor.subject import Subject
from transhume.host.inventory import measure_cpus
from transhume.model.errors import Refused
from transhume.model.finding import Finding, Level
from transhume.vmm.capabilities import cpu_vendor

Progress = Callable[[str], None]
"""Told what is being looked at, before each part."""


async def examine(subject: Subject, progress: Progress = lambda _: None) -> list[Finding]:
    """All that can be found out on this server alone, and on the way to the controller if one is named.

    Takes about a second, and up to `kvm_trial.TRIAL_LIMIT_S` longer where guests hang under KVM. Changes
    nothing.
    """
    progress("kernel")
    findings = kernel.judge(kernel.gather())
    if any(finding.level is Level.ERROR for finding in findings):
        return findings  # without root, or elsewhere than on x86-64, the rest would be wrong
    progress("QEMU")
    state = await qemu.gather(subject.vm_user)
    findings += qemu.judge(state)
    if state.version:
        findings += await _judge_cpu(subject, progress)
    progress("clock, memory, storage and network")
    if subject.controller is None:
        findings += clock.judge(clock.ClockFacts(clock.synchronized()))
    findings += memory.judge(memory.gather())
    findings += storage.judge(await storage.gather(subject.state_dir, subject.vm_user))
    ports = network.gather_ports(subject.address, subject.port)
    findings += network.judge_ports(ports, daemon_runs=subject.daemon_runs)
    findings += network.judge_bridges(network.bridges())
    findings += services.judge(services.gather())
    if subject.controller is not None:
        progress("the way to the controller")
        findings += network.judge_way(await asyncio.to_thread(network.gather_way, subject.controller))
    return findings


async def _judge_cpu(subject: Subject, progress: Progress) -> list[Finding]:
    progress("CPU models")
    try:
        found = cpu.judge(await measure_cpus(subject.vm_user), cpu_vendor())
    except Refused:
        return []  # there is no such user, which another check has told
    progress("KVM: running a guest")
    return found + kvm.judge(await kvm.gather(subject.vm_user, try_anyway=subject.try_kvm))
