"""Starting QEMU: its memory, its rights, its first words."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from transhume.model.errors import VmmError
from transhume.model.vm import RamBlock, VmSpec
from transhume.vmm.command_line import DEFAULT_BINARY, build_command, ram_blocks
from transhume.vmm.log import last_words, log_size
from transhume.vmm.monitor import Monitor
from transhume.vmm.paths import VmPaths, make_vm_dir, replace_file
from transhume.vmm.process import QemuProcess, RunRecord, boot_id, forget, save_record, start_time_ticks
from transhume.vmm.qmp import Qmp
from transhume.vmm.rights import user_rights

OPEN_FILES_MAX = 8192

DEATH_THROES_S = 1.0

_RAM_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class Launched:
    """A QEMU that has started: the process, and the daemon's monitor, connected."""

    process: QemuProcess
    monitor: Monitor


async def launch(
    spec: VmSpec,
    paths: VmPaths,
    *,
    vm_user: str,
    incoming: bool = False,
    deadline_s: float = 20.0,
    binary: str = DEFAULT_BINARY,
) -> Launched:
    """Start QEMU for a resolved `spec` in the folder `paths` and connect to its monitor.

    Makes the folder and the memfds, writes `spec.json`, starts QEMU as `vm_user`, waits until its monitor
    answers and writes `run.json`. Without `incoming` the guest runs; with it QEMU waits, paused, for
    device state.

    Raises `VmmError`, quoting QEMU's last words, when QEMU dies or does not answer within `deadline_s`;
    nothing is left running then.
    """
    make_vm_dir(paths, vm_user)
    forget(paths)
    replace_file(paths.spec_file, spec.model_dump_json())
    said_before_bytes = log_size(paths)
    process = _spawn(spec, paths, vm_user, incoming, binary)
    try:
        monitor = await _connect(process, paths, spec, deadline_s, said_before_bytes)
        record = process.record.model_copy(update={"qemu_version": monitor.version})
        process.record = record
        save_record(paths, record)
    except BaseException:
        process.send_kill()
        await process.wait()
        process.close()
        forget(paths)
        raise
    return Launched(process, monitor)


def create_ram(blocks: Sequence[RamBlock]) -> list[int]:
    """Memfds for the RAM blocks, of a size that nobody can change: a QEMU gone bad could otherwise cut the
    memory away under those who read it.
    """
    fds: list[int] = []
    try:
        for block in blocks:
            fd = os.memfd_create(f"transhume-{block.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            fds.append(fd)
            os.ftruncate(fd, block.size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _RAM_SEALS)
    except OSError as error:
        _close_all(fds)
        raise VmmError(f"no memory for the guest's RAM: {error.strerror}") from error
    return fds


def _spawn(spec: VmSpec, paths: VmPaths, vm_user: str, incoming: bool, binary: str) -> QemuProcess:
    """Start the program; whether it lives, its monitor tells later."""
    uid, gid, further = user_rights(vm_user)
    program = shutil.which(binary)
    if program is None:
        raise VmmError(f"{binary} is not installed on this host: install QEMU for x86 systems")
    fds = create_ram(ram_blocks(spec))
    try:
        command = build_command(spec, paths, fds, incoming=incoming, binary=program)
        with paths.qemu_log.open("ab") as log:
            child = subprocess.Popen(
                [*_limits(), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=fds,
                cwd="/",
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "HOME": "/"},
                start_new_session=True,
                user=uid,
                group=gid,
                extra_groups=further,
                umask=0o077,
            )
    except OSError as error:
        raise VmmError(f"{binary} cannot be started: {error.strerror}") from error
    finally:
        _close_all(fds)
    return _held(child, tuple(fds), incoming)


def _held(child: subprocess.Popen[bytes], ram_fds: tuple[int, ...], incoming: bool) -> QemuProcess:
    """Hold the new process by a pidfd: nobody can have reaped it yet, so its number is its own."""
    try:
        record = RunRecord(
            pid=child.pid,
            start_time_ticks=start_time_ticks(child.pid) or 0,
            boot_id=boot_id(),
            ram_fds=ram_fds,
            incoming=incoming,
        )
        process = QemuProcess(record, os.pidfd_open(child.pid))
    except BaseException:
        child.kill()
        child.wait()
        raise
    # From here on the library's object must not wait for it.
    child.returncode = 0
    process.reap_when_it_ends()
    return process


def _limits() -> list[str]:
    """No core dumps (they would hold the guest's memory), and no more open files than a large VM needs.

    A program of util-linux sets them between the change of user and QEMU: setting the limits of another
    process from outside takes a capability that root does not have everywhere.
    """
    open_files = min(OPEN_FILES_MAX, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    return ["/usr/bin/prlimit", "--core=0", f"--nofile={open_files}", "--"]


async def _connect(
    process: QemuProcess, paths: VmPaths, spec: VmSpec, deadline_s: float, said_before_bytes: int
) -> Monitor:
    """The first connection to the monitor, or the reason why there will be none."""
    began_s = time.monotonic()
    connecting = asyncio.create_task(Qmp.connect(paths.qmp_socket, deadline_s))
    death = asyncio.create_task(process.wait())
    try:
        await asyncio.wait((connecting, death), return_when=asyncio.FIRST_COMPLETED)
        if connecting.done() and connecting.exception() is not None:
            # A QEMU on its way out may have taken the connection before it went.
            await asyncio.wait((death,), timeout=DEATH_THROES_S)
        if death.done():
            raise VmmError(
                f"VM {spec.name}: QEMU ended after {time.monotonic() - began_s:.1f} s, "
                f"before it could be used; it said: {last_words(paths, said_before_bytes)}"
            )
        try:
            return Monitor(connecting.result())
        except VmmError as error:
            said = last_words(paths, said_before_bytes)
            raise VmmError(f"VM {spec.name}: {error.message}; QEMU said: {said}") from error
    finally:
        for task in (connecting, death):
            task.cancel()
        await asyncio.gather(connecting, death, return_exceptions=True)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
