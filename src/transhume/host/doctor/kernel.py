"""Root, the architecture, and what the engine needs of the kernel."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from transhume.memory.kernel import tracking_obstacles
from transhume.model.errors import VmmError
from transhume.model.finding import Finding, error, ok, warning
from transhume.model.vm import PAGE_BYTES, RamBlock
from transhume.vmm.capabilities import kernel_release
from transhume.vmm.launch import create_ram


@dataclass(frozen=True)
class KernelFacts:
    """`tracking` and `memfd` are sentences, empty when the kernel can do it."""

    effective_uid: int
    machine: str
    release: str
    tracking: tuple[str, ...] = ()
    memfd: str = ""


def gather() -> KernelFacts:
    """Ask the running kernel, by really doing it. Takes about a millisecond."""
    root = os.geteuid() == 0
    return KernelFacts(
        effective_uid=os.geteuid(),
        machine=platform.machine(),
        release=kernel_release(),
        tracking=tracking_obstacles() if root else (),
        memfd=_memfd_obstacle(),
    )


def judge(facts: KernelFacts) -> list[Finding]:
    if facts.machine != "x86_64":
        return [
            error(
                "architecture",
                f"this machine is {facts.machine}, and VMs here are x86-64 machines",
                "take an x86-64 server",
            )
        ]
    if facts.effective_uid != 0:
        return [error("root", "this was not started as root", "run it with sudo")]
    findings = [ok("root", "root, on x86-64")]
    if facts.memfd:
        findings.append(error("kernel", facts.memfd, "boot Linux 6.7 or newer"))
    findings += [
        warning(
            "kernel",
            f"Linux {facts.release} cannot track the memory of VMs: {obstacle}",
            "until then VMs leave this host with `transhume migrate --engine qemu`, and come with "
            "--no-post-copy",
        )
        for obstacle in facts.tracking
    ]
    if len(findings) == 1:
        findings.append(ok("kernel", f"Linux {facts.release} tracks memory and fetches descriptors"))
    return findings


def _memfd_obstacle() -> str:
    try:
        fds = create_ram([RamBlock(index=0, name="trial", size_bytes=PAGE_BYTES)])
    except VmmError as refusal:
        return f"the kernel makes no sealed memfd for the RAM of VMs: {refusal.message}"
    for fd in fds:
        os.close(fd)
    return ""
