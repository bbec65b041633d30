"""The few system calls that Python's standard library does not offer, through the C library.

Numbers are those of x86-64. Every function raises `OSError` with the kernel's errno.
"""

from __future__ import annotations

import ctypes
import os

IOCTL = 16
CLOSE = 3
_PIDFD_GETFD = 438

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long

held = ctypes.PyDLL(None, use_errno=True)
"""The same library, called without giving up the interpreter's lock. For calls of a few microseconds that do
not wait, on a path where something waits for us: whoever gives the lock up may get it back only after another
thread's turn, which is many times as long.
"""
held.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
held.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
held.read.restype = ctypes.c_ssize_t
held.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
held.pread.restype = ctypes.c_ssize_t
held.send.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
held.send.restype = ctypes.c_ssize_t


def checked(result: int) -> int:
    """The result of a libc call, or the `OSError` that it left in errno."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def ioctl_at(fd: int, request: int, address: int) -> int:
    """ioctl with a pointer argument. Releases the interpreter's lock for its duration."""
    return checked(libc.ioctl(fd, request, address))


def punch_hole(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Give a range of a memfd back to the kernel: it reads as zeros and takes no memory."""
    checked(libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset_bytes, length_bytes))


def fetch_fd(pid: int, fd: int) -> int:
    """A duplicate, in this process, of the file descriptor `fd` of process `pid` (Linux 5.6)."""
    pidfd = os.pidfd_open(pid)
    try:
        arguments = (ctypes.c_long(pidfd), ctypes.c_long(fd), ctypes.c_long(0))
        return checked(libc.syscall(ctypes.c_long(_PIDFD_GETFD), *arguments))
    finally:
        os.close(pidfd)
