"""What a mover leaves for its successor and for the daemon: one file, one line an entry.

The state is written before the commands of a transition are carried out, so a successor never takes
less for done than was done. Entries survive the death of the process, which is all that they are for:
when the whole host dies, the register alone decides.

Room for all entries is set aside when the file is made: a disk that fills up meanwhile must not keep a
mover from going on, least of all while its VM is paused.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from transhume.memory.syscalls import FALLOC_FL_KEEP_SIZE, checked, libc
from transhume.model.orders import MigrationUpdate

ROOM_BYTES = 256 << 10
"""Far more than the states of a few movers and their last words."""

_CANNOT_RESERVE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM})
"""What file systems answer that set nothing aside; writing may then fail later."""


class Journal:
    """The file `journal.jsonl` of one migration at one end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    @property
    def folder(self) -> Path:
        """The mover's folder."""
        return self._path.parent

    def state(self, state: str) -> None:
        """Note that the machine is going to be in `state`."""
        self._append({"state": state})

    def update(self, update: MigrationUpdate) -> None:
        """Note the last word for the controller."""
        self._append({"update": update.model_dump(mode="json")})

    def last_state(self) -> str | None:
        """The latest state noted, by whichever mover; None when there is none."""
        states = [entry["state"] for entry in self._entries() if "state" in entry]
        return states[-1] if states else None

    def last_update(self) -> MigrationUpdate | None:
        """The last word for the controller; None when none was said."""
        updates = [entry["update"] for entry in self._entries() if "update" in entry]
        return MigrationUpdate.model_validate(updates[-1]) if updates else None

    def close(self) -> None:
        """Close the file; writing opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _append(self, entry: dict[str, Any]) -> None:
        if self._fd is None:
            self._fd = self._open()
        rest = json.dumps(entry).encode() + b"\n"
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def _open(self) -> int:
        """Raises `OSError` when there is no room for a journal."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            size_bytes = os.fstat(fd).st_size
            if size_bytes == 0:
                _reserve(fd)
            elif os.pread(fd, 1, size_bytes - 1) != b"\n":
                os.write(fd, b"\n")  # a dead predecessor's half line must not swallow our first one
        except OSError:
            os.close(fd)
            raise
        return fd

    def _entries(self) -> list[dict[str, Any]]:
        """All whole entries: the last line may have been cut by the death of its writer."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        entries: list[dict[str, Any]] = []
        for line in lines:
            if not line:
                continue
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return entries


def _reserve(fd: int) -> None:
    try:
        checked(libc.fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, ROOM_BYTES))
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise
