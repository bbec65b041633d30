"""The safe copy: a file on storage that both hosts reach, and that now and then cannot be reached."""

from __future__ import annotations

from collections.abc import Callable

from transhume.sim.schedule import Schedule


class SimSafeCopy:
    """Of one migration. `pages` are those that were written, `complete` whether the last record was.

    `files` counts those that were taken away: who has one of them open goes on writing to nobody.

    `removal_failed`: whether one stayed because the storage did not answer. `on_removal` is called when one
    is taken away.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.there = False
        self.pages: set[int] = set()
        self.complete = False
        self.files = 0
        self.removal_failed = False
        self.on_removal: Callable[[], None] | None = None
        self._schedule = schedule
        self._down_until_s = 0.0

    @property
    def reachable(self) -> bool:
        """Whether the storage answers."""
        return self._schedule.now_s >= self._down_until_s

    @property
    def readable(self) -> bool:
        """Whether there is a file, and the storage answers."""
        return self.there and self.reachable

    def go_down(self, duration_s: float) -> None:
        """The storage does not answer for a while."""
        self._down_until_s = self._schedule.now_s + duration_s

    def heal(self) -> None:
        """From now on it does."""
        self._down_until_s = 0.0

    def remove(self) -> None:
        """Take the file away; with storage that does not answer it stays."""
        self.removal_failed |= self.there and not self.reachable
        if self.readable:
            self.there = self.complete = False
            self.pages.clear()
            self.files += 1
            if self.on_removal is not None:
                self.on_removal()
