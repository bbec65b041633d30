"""What is asked of a running QEMU, each verb with its types, on top of the monitor protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transhume.model.vm import VmState
from transhume.vmm.qmp import Qmp


@dataclass(frozen=True)
class LentFd:
    """A file that QEMU holds for us: `number` inside QEMU, in the set `fdset`."""

    number: int
    fdset: int


class Monitor:
    """A monitor of a running QEMU. Every method raises `VmmError` when QEMU refuses or is gone."""

    def __init__(self, qmp: Qmp) -> None:
        self.qmp = qmp

    @classmethod
    async def connect(cls, path: Path, deadline_s: float = 10.0) -> Monitor:
        return cls(await Qmp.connect(path, deadline_s))

    @property
    def version(self) -> str:
        return self.qmp.version

    async def status(self) -> str:
        """QEMU's own word for what the VM does: `running`, `paused`, `inmigrate`, `postmigrate`, ..."""
        raise NotImplementedError

    async def state(self) -> VmState:
        """The same in this project's words."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Stop the vCPUs and let requests to the disks end. Returns when nothing runs any more."""
        raise NotImplementedError

    async def cont(self) -> None:
        """Let the vCPUs run; takes the locks of the disks first. Returns when they run."""
        raise NotImplementedError

    async def quit(self) -> None:
        """End QEMU. Returns when the connection has ended."""
        raise NotImplementedError

    async def power_button(self) -> None:
        """Press the power button: a guest that listens shuts down."""
        raise NotImplementedError

    async def screendump(self) -> bytes:
        """The guest's screen as a PNG. `VmmError` when the VM has no display."""
        raise NotImplementedError

    async def announce(
        self, rounds: int = 5, initial_ms: int = 50, step_ms: int = 100, max_ms: int = 550
    ) -> None:
        """Tell the network where the VM's cards are now."""
        raise NotImplementedError

    async def lend_fd(self, fd: int) -> LentFd:
        """Give QEMU a duplicate of an open file; the answer tells its number inside QEMU."""
        raise NotImplementedError

    async def take_back_fd(self, lent: LentFd) -> None:
        """Close the duplicate in QEMU."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the connection; QEMU goes on."""
        await self.qmp.close()
