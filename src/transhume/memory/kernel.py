"""Can the running kernel track the memory of another process? Found out by really doing it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform

from transhume.memory.pagemap import Scanner
from transhume.memory.syscalls import fetch_fd
from transhume.memory.userfaultfd import REGISTER_WP, create_here
from transhume.model.errors import KernelError
from transhume.model.vm import PAGE_BYTES

_CAP_SYS_PTRACE = 19
_TRIAL_PAGES = 4


def tracking_obstacles() -> tuple[str, ...]:
    """Why this host cannot track and move guest memory, in sentences with their mend; empty if it can.

    Takes about a millisecond and leaves nothing behind.
    """
    obstacles: list[str] = []
    if platform.machine() != "x86_64":
        obstacles.append(f"This engine knows x86-64 only, and this host is {platform.machine()}.")
    if not _may_trace():
        obstacles.append("This process lacks the capability CAP_SYS_PTRACE. Run the daemon as root.")
    if obstacles:
        return tuple(obstacles)
    try:
        _try_tracking()
    except KernelError as error:
        return (error.message,)
    return ()


def _may_trace() -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_SYS_PTRACE & 1)
    return False


def _try_tracking() -> None:
    """Track a few pages of this process, as an engine does those of QEMU; `KernelError` if that fails."""
    with contextlib.ExitStack() as stack:
        uffd = create_here()
        stack.callback(uffd.close)
        scanner = Scanner(os.getpid())
        stack.callback(scanner.close)
        memfd = os.memfd_create("transhume-trial", os.MFD_CLOEXEC)
        stack.callback(os.close, memfd)
        length_bytes = _TRIAL_PAGES * PAGE_BYTES
        os.ftruncate(memfd, length_bytes)
        memory = mmap.mmap(memfd, length_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        uffd.register(address, length_bytes, REGISTER_WP)
        uffd.write_protect(address, length_bytes)
        before = scanner.get_and_clear(address, length_bytes)
        memory[2 * PAGE_BYTES] = 1
        after = scanner.get_and_clear(address, length_bytes)
        if len(before) or after.tolist() != [[2, 1]]:
            raise KernelError(
                f"The kernel {platform.release()} reports written pages wrongly. Boot a newer one."
            )
        _try_fetching(memfd)


def _try_fetching(fd: int) -> None:
    try:
        os.close(fetch_fd(os.getpid(), fd))
    except OSError as error:
        raise KernelError(
            f"The kernel refuses pidfd_getfd: {error.strerror}. Run as root on Linux 5.6 or newer."
        ) from None
