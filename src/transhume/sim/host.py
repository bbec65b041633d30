"""A host: its VM, the journal of its end of the migration, and the daemon that replaces a dead mover."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from transhume.model.migration import Outcome
from transhume.sim.plan import Side
from transhume.sim.schedule import Schedule
from transhume.sim.vm import SimVm

FINAL_STATES = frozenset({"done", "aborted"})
SUCCESSOR_PAUSE_S = 0.5


class SimHost:
    """One end. `start_mover` makes a new mover process, first or successor alike.

    `owed` is the file in which a mover notes the pages that were left for after the resume, None without one.
    `paged` is what a destination has reported once it lacked nothing.
    """

    def __init__(self, side: Side, vm: SimVm, schedule: Schedule, rng: Random) -> None:
        self.side = side
        self.vm = vm
        self.daemon_lives = True
        self.mover_lives = False
        self.journal: list[str] = []
        self.last_word = ""
        self.last_error = ""
        self.last_error_code = ""
        self.last_outcome = Outcome.RUNNING
        self.paged = False
        self.owed: frozenset[int] | None = None
        self.cancel_pending = False
        self.start_mover: Callable[[], None] | None = None
        self._schedule = schedule
        self._rng = rng

    @property
    def last_state(self) -> str | None:
        """The journal's last entry."""
        return self.journal[-1] if self.journal else None

    @property
    def ended(self) -> bool:
        """Whether this end's part of the migration is over."""
        return not self.mover_lives and self.last_state in FINAL_STATES

    def mover_gone(self) -> None:
        """A mover has ended or was killed; the daemon, if it lives, notices."""
        self.mover_lives = False
        self._look_after_the_mover()

    def kill_daemon(self, back_after_s: float) -> None:
        """The daemon dies; VMs and movers go on without it. After a while it is started again."""
        if self.daemon_lives:
            self.daemon_lives = False
            self._schedule.after(back_after_s, self.start_daemon)

    def start_daemon(self) -> None:
        """The daemon looks what it finds."""
        if not self.daemon_lives:
            self.daemon_lives = True
            self._look_after_the_mover()

    def _look_after_the_mover(self) -> None:
        if self.daemon_lives:
            self._schedule.after(SUCCESSOR_PAUSE_S + self._rng.uniform(0.0, 0.3), self._replace_mover)

    def _replace_mover(self) -> None:
        dead_too_early = not self.mover_lives and self.journal and not self.ended
        if dead_too_early and self.daemon_lives and self.start_mover is not None:
            self.start_mover()
