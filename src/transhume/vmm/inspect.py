"""What about a running VM keeps it from being moved: looked up in QEMU itself, told in sentences."""

from __future__ import annotations

import asyncio
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transhume.vmm.monitor import Monitor
from transhume.vmm.rights import user_rights

_PASSED_THROUGH = "vfio-"
_OUTSIDE_DEVICES = "vhost-user-"


@dataclass(frozen=True)
class Obstacles:
    """Each is a sentence that names the thing, the reason and the mend.

    `ram` and `devices` matter to this project's engine; `qemu` are QEMU's own reasons, which block both.
    """

    ram: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    qemu: tuple[str, ...] = ()


async def find_obstacles(monitor: Monitor, pid: int) -> Obstacles:
    """Look at the running QEMU with process id `pid` behind `monitor`."""
    return Obstacles(
        ram=await _ram_obstacles(monitor, pid),
        devices=(
            *await _device_obstacles(monitor),
            *await _network_obstacles(monitor),
            *await _disk_obstacles(monitor),
        ),
        qemu=await _qemu_obstacles(monitor),
    )


async def access_obstacle(path: str, writable: bool, vm_user: str) -> str:
    """Why `vm_user` cannot open the file at `path` on this host; empty when it can.

    A short-lived program that runs as that user asks the kernel: so access lists, file systems mounted
    read-only and network file systems that know no root count too.
    """
    if not Path(path).exists():
        return f"{path} is not there: make it reachable under this path"
    if Path(path).is_dir():
        return f"{path} is a folder, not a file: name the file"
    uid, gid, further = user_rights(vm_user)
    for flag, verb in (("-r", "read"), ("-w", "write")):
        if flag == "-w" and not writable:
            continue
        child = await asyncio.create_subprocess_exec(
            *("/usr/bin/test", flag, path),
            stdin=subprocess.DEVNULL,
            user=uid,
            group=gid,
            extra_groups=further,
        )
        if await child.wait() != 0:
            return f"{vm_user} may not {verb} {path}: give it the right to (owner, mode, folders above)"
    return ""


async def _ram_obstacles(monitor: Monitor, pid: int) -> tuple[str, ...]:
    """RAM must be in shared memfds of ours: nothing else can be read and tracked from outside."""
    found = []
    seen_bytes = 0
    backends: list[dict[str, Any]] = await monitor.qmp.execute("query-memdev")
    for backend in backends:
        name, size_bytes = backend.get("id") or "without a name", int(backend["size"])
        seen_bytes += size_bytes
        where = f"RAM block {name} ({size_bytes >> 20} MiB)"
        if not backend["share"]:
            found.append(f"{where} is not shared: start the VM with share=on for it")
        elif not _maps_our_memfd(pid, backend.get("id")):
            found.append(f"{where} is not a memfd of Transhume's: start the VM with Transhume")
    summary: dict[str, int] = await monitor.qmp.execute("query-memory-size-summary")
    unseen_bytes = summary["base-memory"] + summary.get("plugged-memory", 0) - seen_bytes
    if unseen_bytes > 0:
        found.append(
            f"{unseen_bytes >> 20} MiB of RAM are private to QEMU: start the VM with its RAM in memfds"
        )
    return tuple(found)


def _maps_our_memfd(pid: int, backend: str | None) -> bool:
    """Whether the backend's memory is the memfd that was made for it."""
    try:
        return f"/memfd:transhume-{backend} " in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


async def _device_obstacles(monitor: Monitor) -> tuple[str, ...]:
    """Devices whose other half is not in QEMU: it writes to guest RAM behind QEMU's page tables."""
    found = []
    for folder in ("/machine/peripheral", "/machine/peripheral-anon"):
        entries: list[dict[str, str]] = await monitor.qmp.execute("qom-list", path=folder)
        for entry in entries:
            kind = entry["type"].removeprefix("child<").removesuffix(">")
            if kind.startswith(_PASSED_THROUGH):
                found.append(
                    f"device {entry['name']} ({kind}) is hardware passed through, and its writes to RAM "
                    "cannot be tracked: unplug it first"
                )
            elif kind.startswith(_OUTSIDE_DEVICES):
                found.append(
                    f"device {entry['name']} ({kind}) is served by another process, whose writes to RAM "
                    "cannot be tracked: unplug it first"
                )
    return tuple(found)


async def _network_obstacles(monitor: Monitor) -> tuple[str, ...]:
    """Network backends that are other processes; QEMU tells of them only in its human monitor."""
    text = await monitor.qmp.execute("human-monitor-command", command_line="info network")
    return tuple(
        f"network {name} is served by another process (vhost-user), whose writes to RAM cannot be tracked: "
        "unplug it first"
        for name in re.findall(r"^[\s\\]*(\S+): index=\d+,type=vhost-user\b", str(text), re.MULTILINE)
    )


async def _disk_obstacles(monitor: Monitor) -> tuple[str, ...]:
    """Disks whose reads go past the page cache: the transfer lands in guest RAM unseen by the tracker."""
    found: dict[str, str] = {}
    nodes: list[dict[str, Any]] = await monitor.qmp.execute("query-named-block-nodes", flat=True)
    for node in nodes:
        file = str(node.get("file") or node["node-name"])
        if node["drv"] == "nvme":
            found[file] = f"disk {file} is hardware passed through: unplug it first"
        elif node["drv"] in ("file", "host_device") and node["cache"]["direct"]:
            found[file] = (
                f"disk {file} has cache.direct=on, so that what it reads into RAM can escape the tracker: "
                "start the VM with cache.direct=off for it"
            )
    return tuple(found.values())


async def _qemu_obstacles(monitor: Monitor) -> tuple[str, ...]:
    answer: dict[str, Any] = await monitor.qmp.execute("query-migrate")
    return tuple(f"QEMU itself forbids it: {reason}" for reason in answer.get("blocked-reasons", ()))
