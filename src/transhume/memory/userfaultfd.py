"""userfaultfd: the kernel's interface to page faults, obtained inside QEMU's address space.

A userfaultfd is bound to the address space of the process that creates it, so QEMU must create it.
QEMU runs without privileges, where userfaultfd(2) is refused: root opens /dev/userfaultfd, the caller
hands that descriptor to QEMU (QMP `add-fd`), and one injected `ioctl(USERFAULTFD_IOC_NEW)` makes the
userfaultfd there. This process fetches a duplicate with pidfd_getfd and can do everything else from
outside. QEMU keeps its own descriptor open for ever: were the last one closed with pages missing,
reads would return zeros. A later mover finds it with `find_existing`.

An asyncio caller does it in steps: `open_device` here, hand over, `create_in_process` in a worker
thread, take the device back, then `Userfaultfd.enable`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import struct
from collections.abc import Callable
from dataclasses import dataclass

from transhume.memory.inject import inject_syscall
from transhume.memory.syscalls import CLOSE, IOCTL, checked, fetch_fd, held
from transhume.model.errors import KernelError, VmmError
from transhume.model.vm import PAGE_BYTES

DEVICE = "/dev/userfaultfd"

FEATURE_MISSING_SHMEM = 1 << 5
FEATURE_THREAD_ID = 1 << 8
FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
FEATURE_WP_UNPOPULATED = 1 << 13
FEATURE_WP_ASYNC = 1 << 15
FEATURES = (
    FEATURE_MISSING_SHMEM
    | FEATURE_THREAD_ID
    | FEATURE_WP_HUGETLBFS_SHMEM
    | FEATURE_WP_UNPOPULATED
    | FEATURE_WP_ASYNC
)
"""Always all of them: the handshake happens once in the life of a userfaultfd, which outlives us."""

REGISTER_MISSING = 1
REGISTER_WP = 2

_IOC_NEW = 0xAA00
_API = 0xC018AA3F
_REGISTER = 0xC020AA00
_UNREGISTER = 0x8010AA01
_WRITEPROTECT = 0xC018AA06
_WAKE = 0x8010AA02
_COPY = 0xC028AA03
_ZEROPAGE = 0xC020AA04
_COPY_PROTECTED = 2
_EVENT_PAGEFAULT = 0x12
_MESSAGE = struct.Struct("<B7xQQI4x")
_MAX_MESSAGES = 64
_COUNT = struct.Struct("q")
_API_VERSION = 0xAA
_CopyArgument = ctypes.c_uint64 * 5
_PROTECT_STEP_BYTES = 1 << 30


@dataclass(frozen=True)
class Fault:
    """A thread of the other process that waits for a page. `address` is where it wanted to go."""

    address: int
    thread: int
    write: bool


class Userfaultfd:
    """A duplicate, in this process, of a userfaultfd of another one.

    Addresses are those of the other process. Closing it leaves the other process's descriptor open.
    Calls may come from any thread. The ioctls raise `VmmError` when the process is gone and
    `KernelError` for every other refusal.
    """

    def __init__(self, fd: int, owner: str = "QEMU") -> None:
        self.fd = fd
        self._owner = owner
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._messages = ctypes.create_string_buffer(_MESSAGE.size * _MAX_MESSAGES)

    def enable(self) -> None:
        """Agree on the version and `FEATURES` with the kernel; harmless when that was done before."""
        try:
            self._ioctl(_API, struct.pack("QQQ", _API_VERSION, FEATURES, 0))
        except OSError as error:
            # EINVAL is also the kernel's answer for an unknown feature, so ask it on a fresh one.
            if error.errno != errno.EINVAL or not _kernel_has(FEATURES):
                raise KernelError(
                    "The kernel's userfaultfd lacks asynchronous write protection "
                    f"({error.strerror}). Boot Linux 6.7 or newer."
                ) from None

    def register(self, address: int, length_bytes: int, modes: int) -> None:
        """Watch a mapping: `REGISTER_WP`, `REGISTER_MISSING` or both. Again is allowed."""
        try:
            self._ioctl(_REGISTER, struct.pack("QQQQ", address, length_bytes, modes, 0))
        except OSError as error:
            raise self._failure("watch", address, length_bytes, error) from None

    def unregister(self, address: int, length_bytes: int) -> None:
        """End watching; protected pages become writable again. Harmless when nothing is watched."""
        try:
            self._ioctl(_UNREGISTER, struct.pack("QQ", address, length_bytes))
        except OSError as error:
            raise self._failure("stop watching", address, length_bytes, error) from None

    def write_protect(self, address: int, length_bytes: int) -> None:
        """Protect every page of a watched range, present or not, so that the next write is noticed."""
        for start in range(address, address + length_bytes, _PROTECT_STEP_BYTES):
            step_bytes = min(_PROTECT_STEP_BYTES, address + length_bytes - start)
            self._write_protect_step(start, step_bytes)

    def _write_protect_step(self, address: int, length_bytes: int) -> None:
        while True:
            try:
                self._ioctl(_WRITEPROTECT, struct.pack("QQQ", address, length_bytes, 1))
            except BlockingIOError:
                continue  # the address space was just changing: the kernel asks to call again
            except OSError as error:
                raise self._failure("write-protect", address, length_bytes, error) from None
            return

    def read_faults(self, timeout_s: float) -> list[Fault]:
        """Wait for threads that miss a page; empty when none did within `timeout_s`. For one thread alone."""
        if not self._poll.poll(timeout_s * 1000):
            return []
        try:
            # It does not wait: the descriptor was opened so.
            length_bytes = checked(held.read(self.fd, self._messages, len(self._messages)))
        except BlockingIOError:
            return []  # another reader, or the thread was woken meanwhile
        return [
            Fault(address, thread, bool(flags & 1))
            for event, flags, address, thread in _MESSAGE.iter_unpack(self._messages.raw[:length_bytes])
            if event == _EVENT_PAGEFAULT
        ]

    def copy(
        self, address: int, source_address: int, length_bytes: int, write_protected: bool = False
    ) -> int:
        """Place pages atomically and wake who waits for them; pages that are there already stay as they are.

        `source_address` is in this process. With `write_protected` the range must be watched with
        `REGISTER_WP` too, and the first write to a page is noticed as after `write_protect`, with no moment
        between. Returns how many bytes were new. Raises as every call here; what was placed until then stays.
        """
        mode = _COPY_PROTECTED if write_protected else 0

        def argument(done: int) -> bytes:
            return struct.pack("QQQQq", address + done, source_address + done, length_bytes - done, mode, 0)

        return self._fill(_COPY, argument, address, length_bytes)

    def copy_page(self, address: int, source_address: int, write_protected: bool = False) -> int:
        """As `copy`, for one page that somebody waits for: without giving the interpreter's lock to
        another.
        """
        mode = _COPY_PROTECTED if write_protected else 0
        argument = _CopyArgument(address, source_address, PAGE_BYTES, mode, 0)
        if held.ioctl(self.fd, _COPY, ctypes.byref(argument)) == 0:
            return PAGE_BYTES
        return self.copy(address, source_address, PAGE_BYTES, write_protected)

    def zero_fill(self, address: int, length_bytes: int) -> int:
        """As `copy`, with zeros."""
        return self._fill(
            _ZEROPAGE,
            lambda done: struct.pack("QQQq", address + done, length_bytes - done, 0, 0),
            address,
            length_bytes,
        )

    def _fill(
        self, request: int, argument_from: Callable[[int], bytes], address: int, length_bytes: int
    ) -> int:
        """Both requests end with the kernel's count of what it did, and stop at a page that is there."""
        done = new = 0
        while done < length_bytes:
            argument = bytearray(argument_from(done))
            try:
                fcntl.ioctl(self.fd, request, argument)
                return new + length_bytes - done
            except OSError as error:
                if error.errno == errno.EEXIST:
                    # Somebody may wait although the page is there: it was placed between fault and message.
                    self.wake(address + done, PAGE_BYTES)
                    done += PAGE_BYTES
                elif error.errno == errno.EAGAIN:
                    # Negative when the address space was just changing: call again.
                    placed = max(0, _COUNT.unpack_from(argument, len(argument) - _COUNT.size)[0])
                    done += placed
                    new += placed
                else:
                    raise self._cannot_fill(address + done, length_bytes - done, error) from None
        return new

    def wake(self, address: int, length_bytes: int) -> None:
        """Let every thread that waits in the range look again; who still misses its page faults anew."""
        try:
            self._ioctl(_WAKE, struct.pack("QQ", address, length_bytes))
        except OSError as error:
            raise self._failure("wake", address, length_bytes, error) from None

    def close(self) -> None:
        """Give up this process's duplicate."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _ioctl(self, request: int, argument: bytes) -> None:
        fcntl.ioctl(self.fd, request, bytearray(argument))

    def _cannot_fill(self, address: int, length_bytes: int, error: OSError) -> KernelError | VmmError:
        # Unlike the calls that watch, these name an address space that is gone with ESRCH alone.
        if error.errno == errno.ENOMEM:
            return KernelError(
                f"This host has no memory left for {length_bytes >> 10} KiB of {self._owner} at "
                f"{address:#x}. Free memory."
            )
        return self._failure("fill", address, length_bytes, error)

    def _failure(self, verb: str, address: int, length_bytes: int, error: OSError) -> KernelError | VmmError:
        if error.errno == errno.ESRCH:
            return VmmError(f"{self._owner} ended while its memory was tracked.")
        if (
            error.errno == errno.ENOMEM
        ):  # what REGISTER and UNREGISTER answer for an address space that is gone
            return VmmError(f"{self._owner} ended (or the kernel has no memory left).")
        return KernelError(
            f"The kernel refused to {verb} {length_bytes >> 20} MiB of {self._owner} at {address:#x}: "
            f"{error.strerror}."
        )


def open_device() -> int:
    """A descriptor of /dev/userfaultfd for the caller to hand to QEMU and to close."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(
            f"{DEVICE} does not open: {error.strerror}. It needs root and Linux 6.1 or newer."
        ) from None


def create_in_process(pid: int, device_fd_number_in_process: int) -> Userfaultfd:
    """Make a userfaultfd in process `pid`, whose descriptor of that number is /dev/userfaultfd.

    Returns it enabled. Raises `VmmError` when the process is gone, `KernelError` for a refusal; the
    process then holds no new descriptor. Blocks for about a millisecond: call it from a worker thread.
    """
    number = inject_syscall(pid, IOCTL, device_fd_number_in_process, _IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    if number < 0:
        raise KernelError(f"Process {pid} could not create a userfaultfd: {os.strerror(-number)}.")
    try:
        uffd = Userfaultfd(fetch_fd(pid, number), f"process {pid}")
    except ProcessLookupError:
        raise VmmError(f"Process {pid} ended while a userfaultfd was fetched from it.") from None
    except OSError as error:
        inject_syscall(pid, CLOSE, number)
        raise KernelError(
            f"The userfaultfd of process {pid} cannot be fetched: {error.strerror}. Run as root."
        ) from None
    try:
        uffd.enable()
    except KernelError:
        uffd.close()
        inject_syscall(pid, CLOSE, number)
        raise
    return uffd


def find_existing(pid: int) -> Userfaultfd | None:
    """The userfaultfd that an earlier mover left in process `pid`, enabled; None when there is none."""
    try:
        numbers = sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    except FileNotFoundError:
        raise VmmError(f"Process {pid} does not run.") from None
    for number in numbers:
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/{pid}/fd/{number}") == "anon_inode:[userfaultfd]":
                uffd = Userfaultfd(_fetch(pid, number), f"process {pid}")
                uffd.enable()
                return uffd
    return None


def create_here() -> Userfaultfd:
    """A userfaultfd of this process, enabled: for trials and tests."""
    uffd = Userfaultfd(_new_here(), "this process")
    try:
        uffd.enable()
    except KernelError:
        uffd.close()
        raise
    return uffd


def _new_here() -> int:
    device = open_device()
    try:
        return fcntl.ioctl(device, _IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KernelError(f"The kernel creates no userfaultfd: {error.strerror}.") from None
    finally:
        os.close(device)


def _kernel_has(features: int) -> bool:
    """Whether the running kernel grants all these features to a fresh userfaultfd."""
    fd = _new_here()
    try:
        fcntl.ioctl(fd, _API, bytearray(struct.pack("QQQ", _API_VERSION, features, 0)))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _fetch(pid: int, number: int) -> int:
    try:
        return fetch_fd(pid, number)
    except ProcessLookupError:
        raise VmmError(f"Process {pid} does not run.") from None
    except OSError as error:
        raise KernelError(
            f"The userfaultfd of process {pid} cannot be fetched: {error.strerror}. Run as root."
        ) from None
