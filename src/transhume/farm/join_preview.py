"""What it would change if a server joined the farm, in findings. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from transhume.farm.baseline import joining
from transhume.farm.members import HostStatus
from transhume.model.finding import Finding, error, note, ok, warning
from transhume.model.host import HostInventory


def preview(hosts: Sequence[HostStatus], name: str, candidate: HostInventory) -> tuple[Finding, ...]:
    """`hosts` are the members that have reported; `candidate` would be one more, called `name`."""
    if any(host.name == name for host in hosts):
        return (error("name", f"the farm has a host {name} already", "choose another name with --name"),)
    return (
        _judge_qemu(hosts, name, candidate),
        *_judge_release(hosts, name, candidate),
        *joining({host.name: host.inventory for host in hosts}, name, candidate),
    )


def _judge_qemu(hosts: Sequence[HostStatus], name: str, candidate: HostInventory) -> Finding:
    versions = sorted({host.inventory.qemu_version for host in hosts})
    if not versions or versions == [candidate.qemu_version]:
        return ok("farm-qemu", f"QEMU is {candidate.qemu_version}, as everywhere in the farm")
    others = [host.name for host in hosts if host.inventory.qemu_version != candidate.qemu_version]
    return warning(
        "farm-qemu",
        f"{name} has QEMU {candidate.qemu_version} and {', '.join(others)} {_have(others)} "
        f"{' or '.join(version for version in versions if version != candidate.qemu_version)}: VMs do not "
        "move between them",
        "install the same version on all hosts",
    )


def _judge_release(hosts: Sequence[HostStatus], name: str, candidate: HostInventory) -> list[Finding]:
    releases = {host.inventory.transhume_version for host in hosts} - {candidate.transhume_version}
    if not releases:
        return []
    return [
        note(
            "farm-release",
            f"{name} has Transhume {candidate.transhume_version}, other hosts {', '.join(sorted(releases))}",
            "install the same release on all hosts",
        )
    ]


def _have(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"
