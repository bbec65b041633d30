"""The QEMU process: started with no more rights than it needs, found again by whoever comes later.

QEMU outlives its starter: it has a session of its own, its standard streams are files, and the file
`run.json` tells which process it is. A process id alone would not do, since Linux uses them again: the
process's start time and the machine's boot id make it unique.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from transhume.model.errors import TimedOut, VmmError
from transhume.vmm.paths import VmPaths, replace_file

BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")


class RunRecord(BaseModel):
    """The file `run.json`. `start_time_ticks` is field 22 of `/proc/PID/stat`.

    `ram_fds` are the descriptors inside QEMU that hold its RAM, in the order of the RAM blocks: whoever
    opens `/proc/PID/fd/N` has the guest's memory.
    """

    model_config = ConfigDict(frozen=True)

    pid: int
    start_time_ticks: int
    boot_id: str
    qemu_version: str = ""
    ram_fds: tuple[int, ...] = ()
    incoming: bool = False


class QemuProcess:
    """A QEMU process, held by a pidfd: what is done through it never hits another process.

    Close it when it is no longer needed: that does not end QEMU.
    """

    def __init__(self, record: RunRecord, pidfd: int) -> None:
        self.record = record
        self._pidfd = pidfd

    @classmethod
    def open(cls, record: RunRecord) -> QemuProcess | None:
        """Take hold of the process that `record` names; None when it has ended."""
        if boot_id() != record.boot_id:
            return None
        try:
            pidfd = os.pidfd_open(record.pid)
        except ProcessLookupError:
            return None
        process = cls(record, pidfd)
        _reap(pidfd)
        # Looked up after the pidfd was opened: from here on the number cannot pass to another process.
        if start_time_ticks(record.pid) == record.start_time_ticks:
            return process
        process.close()
        return None

    @property
    def pid(self) -> int:
        return self.record.pid

    @property
    def alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        _reap(self._pidfd)
        return start_time_ticks(self.pid) == self.record.start_time_ticks

    async def wait(self, timeout_s: float | None = None) -> None:
        """Return when the process has ended, reaped if it was our child. `TimedOut` after `timeout_s`."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        # One number can be watched once only: each waiter has a duplicate.
        watched = os.dup(self._pidfd)
        loop.add_reader(watched, ended.set)
        try:
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        except TimeoutError:
            raise TimedOut(f"QEMU (process {self.pid}) has not ended within {timeout_s:g} s") from None
        finally:
            loop.remove_reader(watched)
            os.close(watched)
        _reap(self._pidfd)

    async def kill(self) -> None:
        """End the process at once (SIGKILL) and wait until it is gone. Does nothing when it is dead."""
        self.send_kill()
        await self.wait()

    def send_kill(self) -> None:
        """SIGKILL without waiting, for the way out of a program. Does nothing when it is dead."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def reap_when_it_ends(self) -> None:
        """Take its exit status whenever it ends, for as long as this event loop runs: a parent's duty.

        Whoever ends it, and whether or not this object still exists then, no zombie stays.
        """
        loop = asyncio.get_running_loop()
        watched = os.dup(self._pidfd)

        def reap() -> None:
            loop.remove_reader(watched)
            _reap(watched)
            os.close(watched)

        loop.add_reader(watched, reap)

    def close(self) -> None:
        """Let go of the process without ending it."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pidfd = -1


def _reap(pidfd: int) -> None:
    """Take the exit status of a dead child; what is not ours, or not dead, is left alone."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


def boot_id() -> str:
    """Which boot of this machine this is."""
    return BOOT_ID_FILE.read_text().strip()


def start_time_ticks(pid: int) -> int | None:
    """When the process `pid` started, in clock ticks since boot; None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in brackets and may itself hold blanks and brackets.
    fields = stat[stat.rindex(b")") + 2 :].split()
    state, started = fields[0], fields[19]
    return None if state in (b"Z", b"X") else int(started)


def save_record(paths: VmPaths, record: RunRecord) -> None:
    """Write `run.json`."""
    replace_file(paths.run_file, record.model_dump_json())


def read_record(paths: VmPaths) -> RunRecord | None:
    """What `run.json` says; None when there is none. `VmmError` when it cannot be trusted or read."""
    try:
        descriptor = os.open(paths.run_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise VmmError(f"{paths.run_file} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor) as file:
        # QEMU may make files in this folder: one that it made tells nothing.
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise VmmError(f"{paths.run_file} was not written by this daemon: remove it if no QEMU runs")
        try:
            return RunRecord.model_validate_json(file.read())
        except ValidationError as error:
            raise VmmError(f"{paths.run_file} is damaged: remove it if no QEMU runs") from error


def find_running(paths: VmPaths) -> QemuProcess | None:
    """The QEMU process that `run.json` names, or None when it is not running any more."""
    record = read_record(paths)
    return None if record is None else QemuProcess.open(record)


def forget(paths: VmPaths) -> None:
    """Remove `run.json`, the epoch and the sockets of a QEMU that has ended. Logs stay."""
    for path in (
        paths.run_file,
        paths.epoch_file,
        paths.qmp_socket,
        paths.mover_qmp_socket,
        paths.serial_socket,
        paths.vnc_socket,
    ):
        path.unlink(missing_ok=True)
