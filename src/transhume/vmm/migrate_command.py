"""What both kinds of QEMU migration share: capabilities, a descriptor as the channel, the way it ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transhume.model.errors import TimedOut, VmmError
from transhume.vmm.log import last_words, log_size
from transhume.vmm.monitor import Monitor

ALL_CAPABILITIES = ("events", "x-ignore-shared", "late-block-activate", "pause-before-switchover")
"""Those that this project ever sets: each migration states them all, whatever the one before left."""

ENDED = ("completed", "failed", "cancelled")

CANCEL_LIMIT_S = 10.0

_channel_numbers = itertools.count()


async def set_capabilities(monitor: Monitor, *wanted: str) -> None:
    """Switch on `wanted` and off what else this project ever switches on."""
    assert set(wanted) <= set(ALL_CAPABILITIES), wanted
    await monitor.qmp.execute(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": name in wanted} for name in ALL_CAPABILITIES],
    )


ABANDONED_POLL_S = 0.01
"""Its events went to a process that is dead, so it can only be asked again."""


class QemuMigration:
    """One migration of QEMU's, on either side, from the command that starts it to the event that ends it.

    It learns what happens from events, never by asking again and again. Close it in the end.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._said_before_bytes = log_size(monitor.paths)
        self._listening = ExitStack()
        self._events = self._listening.enter_context(monitor.qmp.subscribe("MIGRATION", "STOP"))
        self._stopped_at_s: float | None = None
        self._status = "none"
        self._channel = ""
        self._begun = False

    async def lend_channel(self, channel_fd: int) -> None:
        """Give QEMU a duplicate of an open pipe or socket, for `start`."""
        assert self._channel == "", "one migration has one channel"
        name = f"migration{next(_channel_numbers)}"
        await self._monitor.qmp.execute_with_fd(channel_fd, "getfd", fdname=name)
        self._channel = name

    async def start(self, command: str) -> None:
        """Run `migrate` or `migrate-incoming` on the channel.

        Raises `VmmError` when QEMU refuses; nothing has begun then.
        """
        assert self._channel, "the channel comes first"
        # Whoever breaks off this wait cannot know whether QEMU has begun: `cancel` finds out.
        self._begun = True
        try:
            await self._monitor.qmp.execute(command, uri=f"fd:{self._channel}")
        except VmmError:
            self._begun = False
            await self.take_back_channel()
            raise

    async def take_back_channel(self) -> None:
        """Let QEMU forget a channel that no migration came to use."""
        # One that QEMU took after all is unknown under its name.
        with contextlib.suppress(VmmError):
            await self._monitor.qmp.execute("closefd", fdname=self._channel)

    @property
    def ended(self) -> bool:
        return self._status in ENDED

    async def wait_stopped(self, timeout_s: float | None = None) -> float:
        """When QEMU stopped the VM: `time.monotonic` of the moment when the news came.

        Raises `VmmError` when the migration ended without a stop, `TimedOut` after `timeout_s`.
        """
        await self._listen_until(lambda: self._stopped_at_s is not None or self.ended, timeout_s)
        if self._stopped_at_s is None:
            raise VmmError(f"QEMU did not stop the VM: its migration {self._status}: {await self.reason()}")
        return self._stopped_at_s

    async def wait_active(self, timeout_s: float | None = None) -> None:
        """Return when QEMU has set the migration up, or ended it; from then on its numbers mean something."""
        await self._listen_until(lambda: self._status not in ("none", "setup"), timeout_s)

    async def wait_ended(self, timeout_s: float | None = None) -> str:
        """`completed`, `failed` or `cancelled`. `VmmError` when QEMU dies, `TimedOut` after `timeout_s`."""
        await self._listen_until(lambda: self.ended, timeout_s)
        return self._status

    async def cancel(self) -> str:
        """Ask QEMU to give up and wait until it has ended, one way or the other: says which.

        One that has not begun never will. Raises `VmmError` when QEMU is gone, `TimedOut` when it cannot
        let go.
        """
        if not self._begun:
            await self.take_back_channel()
        elif not self.ended:
            await self._monitor.qmp.execute("migrate_cancel")
            status = str((await self.query()).get("status", "none"))
            if status in ("none", *ENDED):
                self._status = status
            else:
                await self.wait_ended(CANCEL_LIMIT_S)
        return self._status

    async def query(self) -> dict[str, Any]:
        """QEMU's numbers (`query-migrate`)."""
        answer: dict[str, Any] = await self._monitor.qmp.execute("query-migrate")
        return answer

    async def reason(self) -> str:
        """Why it failed, in QEMU's words: from its monitor if it lives, else from its log."""
        try:
            described = (await self.query()).get("error-desc")
        except VmmError:
            described = None
        return str(described or last_words(self._monitor.paths, self._said_before_bytes))

    def close(self) -> None:
        """Stop listening; what QEMU does goes on."""
        self._listening.close()

    async def _listen_until(self, reached: Callable[[], bool], timeout_s: float | None) -> None:
        give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not reached():
            left_s = None if give_up_s is None else max(0.0, give_up_s - time.monotonic())
            try:
                event = await self._events.next(left_s)
            except TimedOut:
                raise TimedOut(f"QEMU's migration is still {self._status} after {timeout_s:g} s") from None
            if event.name == "STOP":
                self._stopped_at_s = time.monotonic()
            else:
                self._status = str(event.data["status"])


async def end_abandoned(monitor: Monitor, timeout_s: float = 10.0) -> None:
    """End a migration that a process which has died left under way; does nothing when there is none.

    QEMU lets a VM that it had stopped by itself run again then. Raises `VmmError` when QEMU is gone and
    `TimedOut` when it cannot let go.
    """
    give_up_s = time.monotonic() + timeout_s
    asked = False
    while True:
        numbers = await monitor.qmp.execute("query-migrate")
        if numbers.get("status", "none") in ("none", *ENDED):
            return
        if not asked:
            await monitor.qmp.execute("migrate_cancel")
            asked = True
        if time.monotonic() > give_up_s:
            raise TimedOut(f"QEMU's abandoned migration did not end within {timeout_s:g} s")
        await asyncio.sleep(ABANDONED_POLL_S)
