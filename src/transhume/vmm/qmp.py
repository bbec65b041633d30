"""QEMU's monitor protocol: commands, events and file descriptors over a Unix socket.

A thin layer over the `qemu.qmp` library that speaks the errors of this project, keeps no history of
events (the library's default listener would, for as long as the VM lives) and notices at once when QEMU
goes away.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something that QEMU reported: its name (`STOP`, `MIGRATION`, ...) and its data."""

    name: str
    data: dict[str, Any]


class Subscription:
    """Events with some names, from the moment it was made; nothing is lost in between."""

    async def next(self, timeout_s: float | None = None) -> Event:
        """The next event. `TimedOut` after `timeout_s`; `VmmError` when QEMU is gone."""
        raise NotImplementedError

    def __aiter__(self) -> AsyncIterator[Event]:
        """All events until QEMU is gone; then the loop ends."""
        raise NotImplementedError


class Qmp:
    """One connection to one monitor."""

    @classmethod
    async def connect(cls, path: Path, deadline_s: float = 10.0) -> Qmp:
        """Connect and negotiate, trying again until `deadline_s` while nobody listens at `path` yet.

        Raises `VmmError` when the time is over or when the other end does not speak QMP.
        """
        raise NotImplementedError

    @property
    def version(self) -> str:
        """QEMU's version, as in `7.2.22`."""
        raise NotImplementedError

    @property
    def connected(self) -> bool:
        raise NotImplementedError

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command (underscores in argument names become hyphens) and return its answer.

        Raises `VmmError` with QEMU's words when it refuses, and when it goes away before it answers:
        whether the command was carried out is then unknown.
        """
        raise NotImplementedError

    async def execute_with_fd(self, fd: int, command: str, **arguments: Any) -> Any:
        """Run `command` (`getfd`, `add-fd`) with an open descriptor, which stays open here too."""
        raise NotImplementedError

    @contextmanager
    def subscribe(self, *names: str) -> Iterator[Subscription]:
        """Listen to the events called `names` (to all when none are given).

        Subscribe before the command that causes the event.
        """
        yield Subscription()

    async def wait_closed(self) -> None:
        """Return when the connection has ended: QEMU exited, or `close` was called."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the connection; never raises. QEMU goes on."""
        raise NotImplementedError
