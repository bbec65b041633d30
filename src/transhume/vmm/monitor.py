"""What is asked of a running QEMU, each verb with its types, on top of the monitor protocol."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transhume.model.errors import VmmError
from transhume.model.vm import VmState
from transhume.vmm.paths import VmPaths
from transhume.vmm.qmp import Qmp

STATES = {
    "running": VmState.RUNNING,
    "inmigrate": VmState.INCOMING,
    "shutdown": VmState.STOPPED,
    "guest-panicked": VmState.PAUSED,
    "io-error": VmState.PAUSED,
    "internal-error": VmState.PAUSED,
    "paused": VmState.PAUSED,
    "postmigrate": VmState.PAUSED,
    "finish-migrate": VmState.PAUSED,
    "prelaunch": VmState.PAUSED,
    "suspended": VmState.PAUSED,
    "watchdog": VmState.PAUSED,
}
"""QEMU's words for what a VM does. A destination before its device state is `inmigrate`."""


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
    def paths(self) -> VmPaths:
        """The folder of the VM behind this monitor."""
        return VmPaths(self.qmp.path.parent)

    @property
    def version(self) -> str:
        return self.qmp.version

    async def status(self) -> str:
        """QEMU's own word for what the VM does: `running`, `paused`, `inmigrate`, `postmigrate`, ..."""
        answer: dict[str, Any] = await self.qmp.execute("query-status")
        return str(answer["status"])

    async def state(self) -> VmState:
        """The same in this project's words."""
        return STATES.get(await self.status(), VmState.UNKNOWN)

    async def stop(self) -> None:
        """Stop the vCPUs and let requests to the disks end. Returns when nothing runs any more."""
        await self.qmp.execute("stop")

    async def cont(self) -> None:
        """Let the vCPUs run; takes the locks of the disks first. Returns when they run."""
        await self.qmp.execute("cont")

    async def quit(self) -> None:
        """End QEMU. Returns when the connection has ended."""
        # QEMU may be gone before its answer has come: that is what was asked for.
        with contextlib.suppress(VmmError):
            await self.qmp.execute("quit")
        await self.qmp.wait_closed()

    async def power_button(self) -> None:
        """Press the power button: a guest that listens shuts down."""
        await self.qmp.execute("system_powerdown")

    async def screendump(self) -> bytes:
        """The guest's screen as a PNG. `VmmError` when the VM has no display."""
        memory = os.memfd_create("transhume-screen", os.MFD_CLOEXEC)
        # QEMU takes a descriptor from its set only if it is open for exactly what it wants: writing.
        writing = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            lent = await self.lend_fd(writing)
            try:
                await self.qmp.execute("screendump", filename=f"/dev/fdset/{lent.fdset}", format="png")
            finally:
                await self.take_back_fd(lent)
            return os.pread(memory, os.fstat(memory).st_size, 0)
        finally:
            os.close(writing)
            os.close(memory)

    async def announce(
        self, rounds: int = 5, initial_ms: int = 50, step_ms: int = 100, max_ms: int = 550
    ) -> None:
        """Tell the network where the VM's cards are now."""
        await self.qmp.execute("announce-self", initial=initial_ms, max=max_ms, rounds=rounds, step=step_ms)

    async def lend_fd(self, fd: int) -> LentFd:
        """Give QEMU a duplicate of an open file; the answer tells its number inside QEMU."""
        answer: dict[str, int] = await self.qmp.execute_with_fd(fd, "add-fd")
        return LentFd(number=answer["fd"], fdset=answer["fdset-id"])

    async def take_back_fd(self, lent: LentFd) -> None:
        """Close the duplicate in QEMU."""
        await self.qmp.execute("remove-fd", fdset_id=lent.fdset)

    async def close(self) -> None:
        """End the connection; QEMU goes on."""
        await self.qmp.close()
