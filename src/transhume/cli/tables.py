"""The farm as tables: hosts and VMs, and the words that all tables use. Nothing here asks or decides."""

from __future__ import annotations

import shutil
import time

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from transhume.cli.session import on_terminal
from transhume.farm.members import HostStatus
from transhume.model.host import HostState
from transhume.model.vm import Vm

_MIB = 1 << 20

_CERTIFICATE_SHORT_S = 9 * 86400
"""A host renews when ten days are left: with less it could not."""


def show(content: RenderableType) -> None:
    """Print on stdout; wide enough for a whole row where the output is not a terminal."""
    width = None if on_terminal() else max(200, shutil.get_terminal_size().columns)
    Console(width=width, highlight=False, soft_wrap=False).print(content)


def bytes_in_words(count: float) -> str:
    """Traffic and memory as people read them: decimal, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def ms_in_words(duration_ms: float) -> str:
    if duration_ms < 1000:
        return f"{duration_ms:.1f} ms" if duration_ms < 100 else f"{duration_ms:.0f} ms"
    return f"{duration_ms / 1000:.1f} s"


_HOSTS_WIDE = ("RELEASE", "CPU", "OTHER ADDRESSES", "JOINED", "CERTIFICATE UNTIL")
_VMS_WIDE = ("EPOCH", "MACHINE", "CPU", "DISKS", "LABELS", "CREATED")


def hosts_table(hosts: list[HostStatus], now_s: float, wide: bool = False) -> Table:
    """`now_s`: a certificate that should have been renewed by then is told. `wide`: with more columns."""
    table = plain_table(
        "HOST",
        "STATE",
        "ADDRESS",
        "CPUS",
        "MEMORY FREE",
        "QEMU",
        "KERNEL",
        "KVM",
        "MOVES",
        "VMS",
        *(_HOSTS_WIDE if wide else ()),
    )
    for host in hosts:
        inventory = host.inventory
        up = "up" if host.state is HostState.ACTIVE else host.state.value
        seen = _seen(host) or up
        short = _certificate_short(host, now_s)
        colour = "red" if host.silent or host.fenced_at_s or short else "green" if seen == "up" else "yellow"
        free = f"{inventory.memory_available_bytes // _MIB} of {inventory.memory_bytes // _MIB} MiB"
        table.add_row(
            host.name + ("*" if host.controller else ""),
            Text(seen + short, style=colour),
            f"{host.address}:{host.port}",
            str(inventory.cpus),
            free,
            inventory.qemu_version,
            inventory.kernel,
            "no" if inventory.kvm_obstacle else "yes",
            "by QEMU only" if inventory.tracking_obstacles else "yes",
            ", ".join(host.vms) or "-",
            *(_host_wide(host) if wide else ()),
        )
    if hosts:
        table.caption = "* carries the controller"
        table.caption_justify = "left"
    return table


def _host_wide(host: HostStatus) -> tuple[str, ...]:
    inventory = host.inventory
    return (
        inventory.transhume_version,
        inventory.cpu_vendor or "-",
        ", ".join(inventory.other_addresses) or "-",
        clock(host.joined_at_s),
        clock(host.certificate_expires_at_s),
    )


def _seen(host: HostStatus) -> str:
    """What is known of a host that is lost or fenced; empty for any other."""
    if host.fenced_at_s is not None:
        return f"fenced since {clock(host.fenced_at_s)}"
    if host.silent:
        return f"unknown: silent for {host.seen_ago_s:.0f} s, since {clock(host.lost_since_s or 0)}"
    return ""


def _certificate_short(host: HostStatus, now_s: float) -> str:
    left_s = host.certificate_expires_at_s - now_s
    if host.certificate_expires_at_s == 0 or left_s > _CERTIFICATE_SHORT_S:
        return ""
    return f"; certificate ends in {left_s / 86400:.1f} days" if left_s > 0 else "; certificate has ended"


def vms_table(vms: list[Vm], wide: bool = False) -> Table:
    """`wide`: with more columns."""
    headings = ("VM", "STATE", "HOST", "MEMORY", "CPUS", "ACCEL", "MIGRATION")
    table = plain_table(*headings, *(_VMS_WIDE if wide else ()))
    for vm in vms:
        table.add_row(
            vm.spec.name,
            vm.state.value,
            vm.ownership.owner + (" (fenced)" if vm.fenced else ""),
            f"{vm.spec.memory_bytes // _MIB} MiB",
            str(vm.spec.cpus),
            vm.spec.accel.value,
            " then ".join(filter(None, (vm.migration, vm.queued))) or "-",
            *(_vm_wide(vm) if wide else ()),
        )
    return table


def _vm_wide(vm: Vm) -> tuple[str, ...]:
    return (
        str(vm.ownership.epoch),
        vm.spec.machine_type or "-",
        vm.spec.cpu_model or "-",
        ", ".join(disk.path for disk in vm.spec.disks) or "-",
        ", ".join(vm.labels) or "-",
        clock(vm.created_at_s),
    )


def vm_details(vm: Vm) -> Table:
    spec = vm.spec
    rows = {
        "VM": spec.name,
        "state": vm.state.value
        + (
            f"; on fenced host {vm.ownership.owner}: start it elsewhere with `transhume vm start {spec.name}`"
            if vm.fenced
            else ""
        ),
        "host": f"{vm.ownership.owner} (epoch {vm.ownership.epoch})",
        "memory": f"{spec.memory_bytes // _MIB} MiB in {spec.numa_nodes} block(s)"
        + (f", at most {spec.max_memory_bytes // _MIB} MiB" if spec.max_memory_bytes else ""),
        "cpus": str(spec.cpus),
        "machine": f"{spec.machine_type}, {spec.accel.value}, cpu {spec.cpu_model}",
        "kernel": spec.kernel,
        "initrd": spec.initrd,
        "append": spec.append,
        "disks": "\n".join(
            f"{disk.path} ({disk.format}{', cache.direct' if disk.cache_direct else ''}"
            f"{', read-only' if disk.read_only else ''})"
            for disk in spec.disks
        ),
        "display": spec.display.value,
        "migration": vm.migration,
        "queued": vm.queued,
        "labels": ", ".join(vm.labels),
        "reserve": "its share is kept for it while it is stopped" if vm.reserve else "",
        "if its host is fenced": "starts elsewhere" if vm.restart_elsewhere else "",
        "if its host is cut off": "stands still" if vm.strict else "",
        "created": clock(vm.created_at_s),
    }
    return _pairs({name: value for name, value in rows.items() if value})


def clock(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s)) if at_s else "-"


def plain_table(*headings: str, right: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, no_wrap=True, justify="right" if right and number else "left")
    return table


def _pairs(rows: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table
