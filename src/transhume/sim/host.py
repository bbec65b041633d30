"""A host: its VM, the journal of its end of the migration, and the daemon beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from transhume.sim.controller import SimController, Update
from transhume.sim.plan import Side
from transhume.sim.register import SimRegister
from transhume.sim.schedule import Schedule
from transhume.sim.vm import SimVm, VmStatus

FINAL_STATES = frozenset({"done", "aborted"})
SUCCESSOR_PAUSE_S = 0.5
HEARTBEAT_S = 1.0
RELAY_RETRY_S = 1.0


class SimHost:
    """One end. `start_mover` makes a new mover process, first or successor alike.

    The daemon replaces a dead mover, passes on to the controller what the mover says, tells it that the host
    lives, and ends a QEMU that belongs to the other end. `owed` is the file in which a mover notes the pages
    that were left for after the resume, None without one; like the journal and the last word it survives the
    host's death.
    """

    def __init__(
        self,
        vm: SimVm,
        schedule: Schedule,
        rng: Random,
        register: SimRegister,
        controller: SimController,
    ) -> None:
        self.side: Side = vm.side
        self.vm = vm
        self.daemon_lives = True
        self.mover_lives = False
        self.down = False
        self.gone_for_ever = False
        self.journal: list[str] = []
        self.last_word: Update | None = None
        self.owed: frozenset[int] | None = None
        self.cancel_pending = False
        self.start_mover: Callable[[], None] | None = None
        self.kill_mover: Callable[[], None] | None = None
        self.daemon_started: Callable[[], None] | None = None
        self.answer_lost_share = 0.0
        self._schedule = schedule
        self._rng = rng
        self._register = register
        self._controller = controller
        self._said: Update | None = None
        self._heard: Update | None = None
        self._told: Update | None = None
        self._relaying = False
        self._isolated_until_s = 0.0

    @property
    def last_state(self) -> str | None:
        """The journal's last entry."""
        return self.journal[-1] if self.journal else None

    @property
    def ended(self) -> bool:
        """Whether this end's part of the migration is over."""
        return not self.mover_lives and self.last_state in FINAL_STATES

    @property
    def ended_and_told(self) -> bool:
        """Whether the controller knows that, too; only then the mover's folder is removed."""
        return self.ended and self._told is self.last_word

    @property
    def reaches_controller(self) -> bool:
        """Whether the daemon lives and the controller takes what it says."""
        return self.daemon_lives and self._register.reachable(self.side)

    @property
    def isolated(self) -> bool:
        """Whether nothing goes in or out."""
        return self._schedule.now_s < self._isolated_until_s

    @property
    def out_of_reach(self) -> bool:
        """Whether other hosts hear nothing of it."""
        return self.down or self.isolated

    # --- the mover -------------------------------------------------------------------------------

    def hear(self, update: Update, ended: bool) -> None:
        """What the mover says; the last word is noted on disk before."""
        self._said = update
        if ended:
            self.last_word = update
        if self.daemon_lives:
            self._heard = update
            self._want_relay()

    def mover_gone(self) -> None:
        """A mover has ended or was killed; the daemon, if it lives, notices."""
        self.mover_lives = False
        self._said = None
        if self.daemon_lives:
            self._heard = self.last_word or self._heard
            self._want_relay()
        self._look_after_the_mover()

    def _look_after_the_mover(self) -> None:
        if self.daemon_lives:
            self._schedule.after(SUCCESSOR_PAUSE_S + self._rng.uniform(0.0, 0.3), self._replace_mover)

    def _replace_mover(self) -> None:
        dead_too_early = not self.mover_lives and self.journal and not self.ended
        if dead_too_early and self.daemon_lives and self.start_mover is not None:
            self.start_mover()

    # --- the daemon ------------------------------------------------------------------------------

    def kill_daemon(self, back_after_s: float) -> None:
        """The daemon dies; VMs and movers go on without it. After a while it is started again."""
        if self.daemon_lives:
            self.daemon_lives = False
            self._heard = self._told = None
            self._schedule.after(back_after_s, self.start_daemon)

    def start_daemon(self) -> None:
        """The daemon looks what it finds."""
        if self.daemon_lives or self.down:
            return
        self.daemon_lives = True
        if self.daemon_started is not None:
            self.daemon_started()
        self._heard = self.last_word if self._said is None else self._said
        self._want_relay()
        self._look_after_the_mover()

    def _want_relay(self) -> None:
        if not self._relaying and self._heard is not None:
            self._relaying = True
            self._schedule.after(self._rng.uniform(0.001, 0.05), self._relay)

    def _relay(self) -> None:
        """Pass on what the mover said last, again and again until it was heard."""
        self._relaying = False
        if not self.daemon_lives or self._heard is None or self._heard is self._told:
            return
        heard = self._register.reachable(self.side) and self._controller.report(self._heard)
        if heard and not self._register.strikes(self.answer_lost_share):
            self._told = self._heard
        else:
            self._relaying = True
            self._schedule.after(RELAY_RETRY_S, self._relay)

    def beat(self) -> None:
        """The heartbeat, from now on. A mover that lives reports several times a second, changed or not."""
        self._schedule.after(HEARTBEAT_S, self.beat)
        if not self.reaches_controller:
            return
        if self.mover_lives:
            self._controller.hear_of_progress()
        disowned = self._controller.heartbeat(self.side, self.vm.lives)
        if disowned and not self._register.strikes(self.answer_lost_share):
            self._schedule.after(self._rng.uniform(0.001, 0.05), self._end_disowned)

    def _end_disowned(self) -> None:
        """A VM that is being moved is its mover's to end, as long as the mover's folder is there."""
        moving = bool(self.journal) and not self.ended_and_told
        if self.reaches_controller and self._register.owner is not self.side and not moving:
            self.vm.change(VmStatus.GONE)

    # --- the whole host --------------------------------------------------------------------------

    def die(self, back_after_s: float) -> None:
        """Everything that runs here ends at once, and is told by nobody. Infinity: it never comes back."""
        self.down, self.gone_for_ever = True, math.isinf(back_after_s)
        self.vm.kill()
        self.daemon_lives = False
        self._heard = self._told = None
        if self.mover_lives and self.kill_mover is not None:
            self.kill_mover()
        if not self.gone_for_ever:
            self._schedule.after(back_after_s, self.come_back)

    def isolate(self, duration_s: float) -> None:
        """Everything runs on, and reaches nobody. Zero: from now on it does again."""
        self._isolated_until_s = self._schedule.now_s + duration_s

    def come_back(self) -> None:
        """It boots: its files are there, and nothing runs."""
        if self.down and not self.gone_for_ever:
            self.down = False
            self.start_daemon()
