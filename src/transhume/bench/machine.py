"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from transhume.host.config import DEFAULT_VM_USER
from transhume.vmm.capabilities import kvm_obstacle
from transhume.vmm.command_line import DEFAULT_BINARY


def machine_facts() -> dict[str, Any]:
    """This machine, its software and how busy it is now."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_model": _cpu_model(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "qemu": _qemu_version(),
        "accel": "tcg" if kvm_obstacle(DEFAULT_VM_USER) else "kvm",
        "python": platform.python_version(),
        "load_average_at_begin": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def _qemu_version() -> str:
    try:
        said = subprocess.run(
            [DEFAULT_BINARY, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return said.splitlines()[0].removeprefix("QEMU emulator version ")
