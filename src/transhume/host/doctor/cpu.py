"""The CPU: what VMs can be shown of it."""

from __future__ import annotations

from collections.abc import Mapping

from transhume.model.finding import Finding, note, ok, warning
from transhume.model.host import GuestCpus

OLD_LEVEL = 1


def judge(cpus_of: Mapping[str, GuestCpus], vendor: str) -> list[Finding]:
    """`cpus_of` as in `HostInventory`; empty when QEMU could not be asked."""
    if not cpus_of:
        return [
            warning(
                "cpu",
                "QEMU did not tell which CPUs it can show to guests",
                "mend what is said about QEMU, then look again",
            )
        ]
    findings = []
    for accel, cpus in cpus_of.items():
        best = max(cpus.models, key=lambda name: (cpus.models[name], name), default="")
        if not best:
            words = f"under {accel} no named CPU model runs here whole"
            findings.append(
                note("cpu", words, "give VMs the CPU `host` or `max`; they move to equal hosts only")
            )
            continue
        level = cpus.models[best].level
        words = f"{vendor or 'the CPU'} under {accel}: up to {best} (x86-64-v{level})"
        if level <= OLD_LEVEL:
            findings.append(note("cpu", words, "many distributions ask for more than v1; see their notes"))
        else:
            findings.append(ok("cpu", words))
    return findings
