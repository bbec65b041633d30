"""What about a running VM keeps it from being moved: looked up in QEMU itself, told in sentences."""

from __future__ import annotations

from dataclasses import dataclass

from transhume.vmm.monitor import Monitor


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
    raise NotImplementedError


async def access_obstacle(path: str, writable: bool, vm_user: str) -> str:
    """Why `vm_user` cannot open the file at `path` on this host; empty when it can."""
    raise NotImplementedError
