"""The QEMU process: started with no more rights than it needs, found again by whoever comes later.

QEMU outlives its starter: it has a session of its own, its standard streams are files, and the file
`run.json` tells which process it is. A process id alone would not do, since Linux uses them again: the
process's start time and the machine's boot id make it unique.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from transhume.model.vm import VmSpec
from transhume.vmm.monitor import Monitor
from transhume.vmm.paths import VmPaths


class RunRecord(BaseModel):
    """The file `run.json`. `start_time_ticks` is field 22 of `/proc/PID/stat`.

    `ram_fds` are the descriptors inside QEMU that hold its RAM, in the order of the RAM blocks: whoever
    opens `/proc/PID/fd/N` has the guest's memory.
    """

    model_config = ConfigDict(frozen=True)

    pid: int
    start_time_ticks: int
    boot_id: str
    qemu_version: str
    ram_fds: tuple[int, ...]
    incoming: bool = False


class QemuProcess:
    """A QEMU process, held by a pidfd: what is done through it never hits another process.

    Close it when it is no longer needed: that does not end QEMU.
    """

    def __init__(self, record: RunRecord, pidfd: int) -> None:
        self.record = record
        self._pidfd = pidfd

    @property
    def pid(self) -> int:
        return self.record.pid

    @property
    def alive(self) -> bool:
        raise NotImplementedError

    async def wait(self) -> None:
        """Return when the process has ended; reap it if it is a child of ours."""
        raise NotImplementedError

    async def kill(self) -> None:
        """End the process at once (SIGKILL) and wait until it is gone. Does nothing when it is dead."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the process without ending it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Launched:
    """A QEMU that has started: the process, and the daemon's monitor, connected."""

    process: QemuProcess
    monitor: Monitor


async def launch(
    spec: VmSpec, paths: VmPaths, *, vm_user: str, incoming: bool = False, deadline_s: float = 20.0
) -> Launched:
    """Start QEMU for a resolved `spec` in the folder `paths` and connect to its monitor.

    Makes the folder and the memfds, starts QEMU as `vm_user`, waits until its monitor answers and
    writes `run.json`. Without `incoming` the guest runs; with it QEMU waits, paused, for device state.

    Raises `VmmError`, quoting QEMU's last words, when QEMU dies or does not answer within `deadline_s`;
    nothing is left running then.
    """
    raise NotImplementedError


def find_running(paths: VmPaths) -> QemuProcess | None:
    """The QEMU process that `run.json` names, or None when it is not running any more."""
    raise NotImplementedError


def forget(paths: VmPaths) -> None:
    """Remove `run.json` and the sockets of a QEMU that has ended. Logs stay."""
    raise NotImplementedError
