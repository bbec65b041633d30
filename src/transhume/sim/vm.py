"""A VM as its host sees it: whether QEMU lives, whether its vCPUs run, and what content it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum

from transhume.sim.plan import Side
from transhume.sim.schedule import Schedule

MONITOR_PAUSE_S = 0.0001
"""QEMU takes one command after the other, whoever sent them."""


class VmStatus(StrEnum):
    """`ABSENT` was not made yet, `DEAD` is a QEMU that ended by itself, `GONE` was removed by a mover."""

    ABSENT = "absent"
    PAUSED = "paused"
    RUNNING = "running"
    DEAD = "dead"
    GONE = "gone"


class SimVm:
    """One end's VM.

    `content` stands for everything that the guest has in memory and devices: a number that changes whenever
    the vCPUs run. `ram_content` and `state_content` are what a destination was given, None before.

    `missing` are the pages that a destination still lacks of that RAM, `placed` those that it lacked once.
    `uncompared`: whether its source must compare them before it may be freed. `guarded`: whether the kernel
    lets who needs a missing page wait for it; otherwise it reads zeros.
    """

    def __init__(self, side: Side, status: VmStatus, schedule: Schedule) -> None:
        self.side = side
        self.status = status
        self.content = 0
        self.ram_content: int | None = None
        self.state_content: int | None = None
        self.missing: set[int] = set()
        self.placed: set[int] = set()
        self.uncompared = False
        self.guarded = False
        self.was_killed = False
        self.death_was_noticed = False
        self.on_change: Callable[[SimVm, VmStatus], None] | None = None
        self.on_memory: Callable[[SimVm, int | None], None] | None = None
        self._schedule = schedule
        self._free_s = 0.0

    @property
    def lives(self) -> bool:
        """Whether QEMU can carry out a command."""
        return self.status in (VmStatus.PAUSED, VmStatus.RUNNING)

    @property
    def still_content(self) -> int | None:
        """What a scan or a save finds now: nothing that stays true while the vCPUs run."""
        return None if self.status is VmStatus.RUNNING else self.content

    def command(self, delay_s: float, effect: Callable[[], None]) -> None:
        """Queue a command at QEMU's monitor; it takes effect after `delay_s`, and after earlier ones."""
        due_s = max(self._schedule.now_s + delay_s, self._free_s + MONITOR_PAUSE_S)
        self._free_s = due_s
        self._schedule.at(due_s, effect)

    def change(self, status: VmStatus) -> None:
        """Set the status, and tell whoever watches."""
        before = self.status
        if status is before:
            return
        self.status = status
        if status is VmStatus.RUNNING:
            self.content += 1
        if self.on_change is not None:
            self.on_change(self, before)

    def owe(self, pages: Iterable[int]) -> None:
        """These pages are not here. Whatever an earlier pass brought of them is dropped."""
        self.missing |= set(pages)
        self.placed -= self.missing

    def guard(self, guarded: bool) -> None:
        """Let the kernel hold whoever needs a missing page, or not."""
        self.guarded = guarded
        if self.on_memory is not None:
            self.on_memory(self, None)

    def place(self, page: int) -> None:
        """Put one page in its place."""
        if self.on_memory is not None:
            self.on_memory(self, page)
        self.missing.discard(page)
        self.placed.add(page)

    def kill(self) -> bool:
        """QEMU dies; False when there was none."""
        if not self.lives:
            return False
        self.was_killed = True
        self.change(VmStatus.DEAD)
        return True
