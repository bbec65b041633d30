"""PAGEMAP_SCAN: get the pages that a process wrote, and protect them again if wanted, in one system call.

The pages must be watched by a userfaultfd with asynchronous write protection (Linux 6.7). The masks
are exactly those that all such kernels report correctly: with others, some (Ubuntu's 6.8) call a page
clean that was written and then zapped.
"""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np
from numpy.typing import NDArray

from transhume.memory.runs import Runs, empty, from_bounds, union
from transhume.memory.syscalls import ioctl_at
from transhume.model.errors import KernelError, VmmError
from transhume.model.vm import PAGE_BYTES

_PAGEMAP_SCAN = 0xC0606610
_WP_MATCHING = 1
_CHECK_WPASYNC = 2
_PAGE_IS_WRITTEN = 2
_ENTRY_BYTES = 8
_REGIONS = 1 << 15
"""Regions fetched by one call: 768 KiB of buffer. More regions take more calls."""


_SCAN_FIELDS = (
    "size",
    "flags",
    "start",
    "end",
    "walk_end",
    "vec",
    "vec_len",
    "max_pages",
    "category_inverted",
    "category_mask",
    "category_anyof_mask",
    "return_mask",
)


class _ScanArgument(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in _SCAN_FIELDS)


class Scanner:
    """Reads the written pages of one process. Not for two threads at once: it reuses its buffer."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        try:
            self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise VmmError(f"Process {pid} does not run.") from None
        except OSError as error:
            raise KernelError(f"/proc/{pid}/pagemap does not open: {error.strerror}. Run as root.") from None
        self._regions: NDArray[np.int64] = np.zeros((_REGIONS, 3), dtype=np.int64)

    def get_and_clear(self, address: int, length_bytes: int) -> Runs:
        """The pages of the range written since the last call (or since they were protected).

        Page 0 is at `address`. Every page returned is protected again when this returns, so that whoever
        reads its content afterwards either sees a later write or finds it in the next call's answer.
        """
        return self._written(address, length_bytes, _WP_MATCHING | _CHECK_WPASYNC)

    def get(self, address: int, length_bytes: int) -> Runs:
        """As `get_and_clear`, and clears nothing: what was written once is in every answer.

        Whoever has read a page's content before, and does not find it here, has read what it held when it was
        protected.
        """
        return self._written(address, length_bytes, _CHECK_WPASYNC)

    def _written(self, address: int, length_bytes: int, flags: int) -> Runs:
        pieces: list[NDArray[np.int64]] = []
        position, end = address, address + length_bytes
        while position < end:
            found, position = self._scan(position, end, flags)
            pieces.append(self._regions[:found, :2] - address)
        self._check_alive(address)
        if not pieces:
            return empty()
        bounds = np.concatenate(pieces) // PAGE_BYTES
        if (bounds[1:, 0] >= bounds[:-1, 1]).all():
            return from_bounds(bounds[:, 0], bounds[:, 1])
        return union(np.stack((bounds[:, 0], bounds[:, 1] - bounds[:, 0]), axis=1), empty())

    def _check_alive(self, address: int) -> None:
        """A scan of a process that has ended finds nothing written, which nobody may take for an answer.

        Reading the same file tells: it is empty once the address space is gone.
        """
        if len(os.pread(self._fd, _ENTRY_BYTES, address // PAGE_BYTES * _ENTRY_BYTES)) != _ENTRY_BYTES:
            raise VmmError(f"Process {self._pid} ended while its memory was tracked.")

    def close(self) -> None:
        """Close the process's pagemap."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _scan(self, start: int, end: int, flags: int) -> tuple[int, int]:
        """Fill the buffer; return how many regions it holds, and how far the walk certainly came.

        A kernel that has filled its own buffer, of 512 regions, tells how far it had come by then, although
        it went on to the end: what comes after is then found twice.
        """
        argument = _ScanArgument(
            size=ctypes.sizeof(_ScanArgument),
            flags=flags,
            start=start,
            end=end,
            vec=self._regions.ctypes.data,
            vec_len=_REGIONS,
            category_mask=_PAGE_IS_WRITTEN,
            return_mask=_PAGE_IS_WRITTEN,
        )
        try:
            found = ioctl_at(self._fd, _PAGEMAP_SCAN, ctypes.addressof(argument))
        except OSError as error:
            raise self._failure(error) from None
        return found, int(argument.walk_end)

    def _failure(self, error: OSError) -> KernelError | VmmError:
        if error.errno == errno.ESRCH:
            return VmmError(f"Process {self._pid} ended while its memory was tracked.")
        if error.errno == errno.EPERM:
            return KernelError(f"The memory of process {self._pid} is not, or no longer, tracked.")
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return KernelError("The kernel has no PAGEMAP_SCAN. Boot Linux 6.7 or newer.")
        return KernelError(f"Scanning the memory of process {self._pid} failed: {error.strerror}.")
