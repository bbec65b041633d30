"""Follow growing files and say when each piece of them arrived: a process of its own for the observer.

    python -m transhume.demo.serial_tail FILE...

Each piece goes to standard output as one record: the monotonic time of its arrival in seconds (double),
the number of its file (u32), its length (u32), all little-endian, and its bytes. It runs apart from the
observer's own process because a thread there would wait for the interpreter's lock and see silences that
were none. It ends when nobody reads its output any more.

A file may appear later, and may be replaced (a VM that comes back gets a new folder): inotify wakes the
follower at once when a known file grows, and it looks for new files every few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

RECORD = struct.Struct("<dII")
LOOK_AGAIN_MS = 5
_READ_BYTES = 65536
_IN_MODIFY = 0x2


class _FollowedFile:
    """One path: the file that is there now, open, with everything up to its offset passed on."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd: int | None = None
        self._inode: tuple[int, int] | None = None

    def appeared(self) -> bool:
        """Open the file if there is one now that is not open yet; says whether that happened."""
        try:
            status = os.stat(self._path)
            if (status.st_dev, status.st_ino) == self._inode:
                return False
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        if self._fd is not None:
            os.close(self._fd)
        self._fd = fd
        opened = os.fstat(fd)
        self._inode = (opened.st_dev, opened.st_ino)
        return True

    def read(self) -> bytes:
        return os.read(self._fd, _READ_BYTES) if self._fd is not None else b""


def follow(paths: Sequence[str], output: int) -> None:
    """Write records of the growth of `paths` to the file descriptor `output` until it is closed."""
    files = [_FollowedFile(path) for path in paths]
    notices = _open_inotify()
    poller = select.poll()
    poller.register(notices, select.POLLIN)
    poller.register(output, 0)  # to be told when the reader has gone
    while True:
        for file, path in zip(files, paths, strict=True):
            if file.appeared():
                with suppress(OSError):
                    _watch(notices, path)
        for _, happened in poller.poll(LOOK_AGAIN_MS):
            if happened & (select.POLLERR | select.POLLHUP):
                return
        arrived_s = time.monotonic()
        with suppress(BlockingIOError):
            os.read(notices, _READ_BYTES)
        for number, file in enumerate(files):
            while data := file.read():
                os.write(output, RECORD.pack(arrived_s, number, len(data)) + data)


_libc = ctypes.CDLL(None, use_errno=True)


def _open_inotify() -> int:
    fd = int(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    return fd


def _watch(notices: int, path: str) -> None:
    if _libc.inotify_add_watch(notices, os.fsencode(path), _IN_MODIFY) < 0:
        raise OSError(ctypes.get_errno(), f"inotify_add_watch {path}")


if __name__ == "__main__":
    with suppress(BrokenPipeError, KeyboardInterrupt):
        follow(sys.argv[1:], sys.stdout.fileno())
