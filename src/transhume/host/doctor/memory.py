"""Memory: how much, and what may take it away from VMs."""

from __future__ import annotations

import re
import resource
from dataclasses import dataclass
from pathlib import Path

from transhume.model.finding import Finding, error, note, ok, warning
from transhume.vmm.launch import OPEN_FILES_MAX

LITTLE_BYTES = 1 << 30
TOO_LITTLE_BYTES = 256 << 20
FEW_FILES = 1024
NEVER_OVERCOMMIT = 2

_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryFacts:
    """`huge_free_bytes` are set aside as huge pages and unused. `cgroup_limit_bytes` is the least of the
    limits of this process's cgroups, None when there is none; so with `cgroup_tasks`.
    """

    total_bytes: int
    available_bytes: int
    swap_bytes: int = 0
    huge_free_bytes: int = 0
    overcommit: int = 0
    cgroup_limit_bytes: int | None = None
    cgroup_tasks: int | None = None
    open_files: int = OPEN_FILES_MAX


def gather(proc: Path = Path("/proc"), cgroups: Path = _CGROUPS) -> MemoryFacts:
    """Read what the kernel says of this machine and of this process's cgroup."""
    text = (proc / "meminfo").read_text()
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s*(\d+)", text, re.MULTILINE)}
    cgroup = (proc / "self" / "cgroup").read_text()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return MemoryFacts(
        total_bytes=kib["MemTotal"] << 10,
        available_bytes=kib["MemAvailable"] << 10,
        swap_bytes=kib.get("SwapTotal", 0) << 10,
        # The count of free huge pages has no unit; their size is in KiB.
        huge_free_bytes=kib.get("HugePages_Free", 0) * kib.get("Hugepagesize", 0) << 10,
        overcommit=int((proc / "sys" / "vm" / "overcommit_memory").read_text()),
        cgroup_limit_bytes=least_limit(cgroup, cgroups, "memory.max", "memory.limit_in_bytes", "memory"),
        cgroup_tasks=least_limit(cgroup, cgroups, "pids.max", "pids.max", "pids"),
        open_files=OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else hard,
    )


def least_limit(cgroup: str, root: Path, file: str, old_file: str, controller: str) -> int | None:
    """The least number in `file` from this process's cgroup up to the root; `cgroup` is /proc/self/cgroup.

    `old_file` and `controller` are for cgroups of version 1, where each controller has a tree of its own.
    """
    found = []
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = root, file
        elif controller in controllers.split(","):
            base, name = root / controller, old_file
        else:
            continue
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_relative_to(base):
                found += _numbers(folder / name)
    return min(found, default=None)


def judge(facts: MemoryFacts) -> list[Finding]:
    available = f"{facts.available_bytes >> 20} of {facts.total_bytes >> 20} MiB of memory are available"
    findings: list[Finding] = []
    if facts.available_bytes < TOO_LITTLE_BYTES:
        findings.append(error("memory", f"only {available}: no VM fits", "end what uses it, or add memory"))
    elif facts.available_bytes < LITTLE_BYTES:
        findings.append(warning("memory", f"only {available}", "end what uses it, or add memory"))
    else:
        findings.append(ok("memory", available))
    findings += _judge_limits(facts)
    if facts.overcommit == NEVER_OVERCOMMIT:
        findings.append(
            warning(
                "overcommit",
                "vm.overcommit_memory is 2: QEMU asks for more address space than it uses, so VMs may "
                "not start "
                "though memory is there",
                "sysctl -w vm.overcommit_memory=0",
            )
        )
    if facts.huge_free_bytes > facts.total_bytes // 10:
        findings.append(
            warning(
                "huge-pages",
                f"{facts.huge_free_bytes >> 20} MiB are set aside as huge pages, which VMs here do not use",
                "sysctl -w vm.nr_hugepages=0",
            )
        )
    if facts.swap_bytes:
        findings.append(
            note(
                "swap",
                f"{facts.swap_bytes >> 20} MiB of swap: memory of VMs may be swapped out, and they "
                f"move slower then",
                "sysctl -w vm.swappiness=1",
            )
        )
    return findings


def _judge_limits(facts: MemoryFacts) -> list[Finding]:
    findings = []
    if facts.cgroup_limit_bytes is not None and facts.cgroup_limit_bytes < facts.total_bytes:
        limit = f"{facts.cgroup_limit_bytes >> 20} of {facts.total_bytes >> 20} MiB"
        findings.append(
            warning(
                "cgroup",
                f"this process's cgroup may use {limit}, and the daemon and its VMs would inherit that",
                "start the daemon outside of that cgroup, or raise its limit (MemoryMax=)",
            )
        )
    if facts.cgroup_tasks is not None and facts.cgroup_tasks < FEW_FILES:
        findings.append(
            warning(
                "cgroup",
                f"this process's cgroup may have {facts.cgroup_tasks} tasks, and the daemon and its "
                f"VMs would "
                "inherit that",
                "start the daemon outside of that cgroup, or raise its limit (TasksMax=)",
            )
        )
    if facts.open_files < FEW_FILES:
        findings.append(
            warning(
                "open-files",
                f"a process may have {facts.open_files} files open, which is few for a VM with many disks",
                "ulimit -Hn 8192 before the daemon is started (LimitNOFILE= in a unit)",
            )
        )
    return findings


def _numbers(path: Path) -> list[int]:
    try:
        text = path.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []  # `max`: no limit
