"""Whether some QEMU, on any host, has an image open for writing.

QEMU locks bytes of an image file instead of the whole (file-posix.c, `RAW_LOCK_PERM_BASE`): byte 100 + n
stands for the permission with bit n that somebody holds, and bit 1 is to write. The locks are open file
description locks, which NFS carries to other hosts.
"""

from __future__ import annotations

import fcntl
import os
import struct

F_OFD_GETLK = 36
WRITER_BYTE = 101
_FLOCK = struct.Struct("hhqqi4x")


def has_writer(path: str) -> bool:
    """Whether an open QEMU may write the image; an incoming or suspended one may not.

    Raises `OSError` when the file cannot be opened, or its file system has no locks: nothing is known then.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, WRITER_BYTE, 1, 0)
        answer = fcntl.fcntl(fd, F_OFD_GETLK, question)
    finally:
        os.close(fd)
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK
