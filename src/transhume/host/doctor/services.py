"""Other programs on the server that get in a host's way, or that look as if they did."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from transhume.model.finding import Finding, note, ok, warning

_KILLERS = frozenset({"earlyoom", "systemd-oomd", "nohang", "oomd"})
_NEIGHBOURS = {
    "libvirtd": "libvirt runs here too: its VMs take memory that Transhume counts as available before "
    "they start",
    "virtqemud": "libvirt runs here too: its VMs take memory that Transhume counts as available before "
    "they start",
    "ksmd-tuned": "pages of VMs are merged (KSM), and are taken apart again when they move",
    "ksmtuned": "pages of VMs are merged (KSM), and are taken apart again when they move",
    "etcd": "an etcd runs here; that is fine, also for the farm's own store",
}


def gather(proc: Path = Path("/proc")) -> frozenset[str]:
    """The names of all processes, as the kernel has them (15 characters at most)."""
    names = set()
    for comm in proc.glob("[0-9]*/comm"):
        try:
            names.add(comm.read_text().strip())
        except OSError:
            continue  # it has ended meanwhile
    return frozenset(names)


def judge(names: Collection[str]) -> list[Finding]:
    findings = [
        warning(
            "services",
            f"{name} runs here: it kills large processes before memory ends, and VMs are large processes",
            f"systemctl disable --now {name}, or exempt qemu-system-x86",
        )
        for name in sorted(_KILLERS & set(names))
    ]
    told = {_NEIGHBOURS[name] for name in sorted(names) if name in _NEIGHBOURS}
    findings += [note("services", words) for words in sorted(told)]
    return findings or [ok("services", "no other program gets in the way")]
